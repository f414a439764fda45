// Prompt rows in front of the first real token of every row, with mask, positions and labels; and the gradients.
// On the LibTorch stable ABI: compiles against any torch >= 2.10, a CPU build included.
#include "common.cuh"

namespace peftkern {
namespace {

struct Sizes {
  int64_t batch, length, prompt, hidden;
  __host__ __device__ int64_t out() const { return length + prompt; }
};

// ---- kernels

constexpr int kMasksAtOnce = 8;
constexpr int kVectorsAtOnce = 4;
constexpr int kBlocksPerProcessor = 16;
constexpr int64_t kMostRows = 65535;  // the grid's y dimension ends there; kernels stride beyond

// What a warp moves at a time: so many vectors a lane, all loads on their way before the first store.
template <class T>
constexpr int64_t kPiece = kVectorsAtOnce * kWarp * kVectorBytes / sizeof(T);

template <class T>
__host__ __device__ inline int64_t pieces_of(int64_t hidden) {
  return (hidden + kPiece<T> - 1) / kPiece<T>;
}

// The index of the first nonzero of a row of the mask, or 0; the whole block looks for it.
__device__ inline int64_t first_nonzero(const int64_t* mask, int64_t length) {
  __shared__ unsigned long long first;
  if (length > 0 && mask[0] != 0) return 0;  // no padding in front, as most often
  __syncthreads();
  if (threadIdx.x == 0) first = static_cast<unsigned long long>(length);
  __syncthreads();
  for (int64_t s0 = threadIdx.x; s0 - threadIdx.x < length; s0 += kMasksAtOnce * kThreads) {
    int64_t found = length;
#pragma unroll
    for (int i = kMasksAtOnce; i-- > 0;) {
      const int64_t s = s0 + i * kThreads;
      if (s < length && mask[s] != 0) found = s;
    }
    if (found < length) atomicMin(&first, static_cast<unsigned long long>(found));
    if (__syncthreads_or(found < length)) break;
  }
  const int64_t at = static_cast<int64_t>(first);
  return at == length ? 0 : at;
}

__global__ void start_kernel(const int64_t* mask, Sizes n, int64_t* start) {
  for (int64_t b = blockIdx.x; b < n.batch; b += gridDim.x) {
    const int64_t at = first_nonzero(mask + b * n.length, n.length);
    if (threadIdx.x == 0) start[b] = at;
  }
}

// Mask, positions and labels of one output row, whose prompt begins at `start`; labels may be null.
struct Tokens {
  const int64_t *mask, *labels;
  int64_t *mask_out, *positions, *labels_out;
};
__device__ inline void write_tokens(const Tokens& tokens, const Sizes& n, int64_t b, int64_t start) {
  __shared__ int64_t warp_sums[kThreads / kWarp];
  __shared__ int64_t carried;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) carried = 0;
  __syncthreads();
  // An inclusive prefix sum of the new mask, kThreads positions at a time.
  for (int64_t j0 = 0; j0 < n.out(); j0 += kThreads) {
    const int64_t j = j0 + threadIdx.x;
    const bool inside = j < n.out(), is_prompt = j >= start && j < start + n.prompt;
    const int64_t from = b * n.length + (j < start ? j : j - n.prompt), to = b * n.out() + j;
    const int64_t own = !inside ? 0 : is_prompt ? 1 : tokens.mask[from];
    int64_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t before = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += before;
    }
    if (lane == kWarp - 1) warp_sums[warp] = sum;
    __syncthreads();
    int64_t total = carried;
    for (int w = 0; w < warp; ++w) total += warp_sums[w];
    total += sum;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) carried = total;
    if (inside) {
      tokens.mask_out[to] = own;
      tokens.positions[to] = total > 0 ? total - 1 : 0;
      if (tokens.labels) tokens.labels_out[to] = is_prompt ? -100 : tokens.labels[from];
    }
    __syncthreads();
  }
}

template <class S, class T>
__device__ inline T converted(S from) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    T to;
    from_float(to_float(from), &to);
    return to;
  }
}

// A warp moves one piece of a row, 16 bytes of `to` a lane where everything is aligned (VECTOR).
template <bool VECTOR, class S, class T>
__device__ inline void move(const S* from, T* to, int64_t hidden, int64_t piece, int lane) {
  const int64_t begin = piece * kPiece<T>, left = hidden - begin, count = left < kPiece<T> ? left : kPiece<T>;
  from += begin, to += begin;
  if constexpr (VECTOR) {
    constexpr int kWidth = kVectorBytes / sizeof(T);
    // Indices into arrays of vectors: with byte offsets the compiler takes the first store of four apart.
    const auto* in = reinterpret_cast<const Pack<S, kWidth>*>(from) + lane;
    auto* out = reinterpret_cast<Pack<T, kWidth>*>(to) + lane;
    const int packs = static_cast<int>(count / kWidth) - lane;
    Pack<S, kWidth> held[kVectorsAtOnce];
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i)
      if (i * kWarp < packs) held[i] = in[i * kWarp];
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      if (i * kWarp >= packs) break;
      Pack<T, kWidth> made;
      for (int e = 0; e < kWidth; ++e) made.value[e] = converted<S, T>(held[i].value[e]);
      out[i * kWarp] = made;
    }
  } else {
    for (int64_t at = lane; at < count; at += kWarp) to[at] = converted<S, T>(from[at]);
  }
}

template <class T, class P>
struct Rows {
  const int64_t* ids;  // null: source is [B, S, H]
  const T* source;
  int64_t vocabulary;
  const P* prompt;
  T* out;
};

// Every block finds the start of its batch row from the mask, so that nothing is launched before. The first block of a
// batch row writes its tokens, the others its embeddings, a warp a piece of a row.
template <class T, class P, bool VECTOR>
__global__ void concat_kernel(Rows<T, P> rows, Tokens tokens, Sizes n) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) - 1) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t warps = (static_cast<int64_t>(gridDim.x) - 1) * (kThreads / kWarp);
  const int64_t pieces = pieces_of<T>(n.hidden);
  for (int64_t b = blockIdx.y; b < n.batch; b += gridDim.y) {
    const int64_t start = first_nonzero(tokens.mask + b * n.length, n.length);
    if (blockIdx.x == 0) {
      write_tokens(tokens, n, b, start);
      continue;
    }
    for (int64_t i = warp; i < n.out() * pieces; i += warps) {
      const int64_t j = i / pieces, piece = i % pieces, t = j - start;
      T* to = rows.out + (b * n.out() + j) * n.hidden;
      if (t >= 0 && t < n.prompt) {
        move<VECTOR>(rows.prompt + t * n.hidden, to, n.hidden, piece, lane);
        continue;
      }
      int64_t row = b * n.length + (t < 0 ? j : j - n.prompt);
      if (rows.ids) {
        row = rows.ids[row];
        assert(row >= 0 && row < rows.vocabulary && "prompt_concat: id out of range");
      }
      move<VECTOR>(rows.source + row * n.hidden, to, n.hidden, piece, lane);
    }
  }
}

// d_embeds: a warp a piece of a row, the forward copy backwards.
template <class T, bool VECTOR>
__global__ void d_embeds_kernel(const T* dout, const int64_t* start, Sizes n, T* d_embeds) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t pieces = pieces_of<T>(n.hidden);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       i < n.batch * n.length * pieces; i += warps) {
    const int64_t row = i / pieces, b = row / n.length, s = row % n.length;
    const int64_t from = b * n.out() + (s < start[b] ? s : s + n.prompt);
    move<VECTOR>(dout + from * n.hidden, d_embeds + row * n.hidden, n.hidden, i % pieces, lane);
  }
}

// d_prompt: a thread an element, the batch summed in order, so that the result does not vary.
template <class T>
__global__ void d_prompt_kernel(const T* dout, const int64_t* start, Sizes n, float* d_prompt) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n.prompt * n.hidden; i += stride) {
    const int64_t t = i / n.hidden, h = i % n.hidden;
    float sum = 0.0f;
    for (int64_t b = 0; b < n.batch; ++b) sum += to_float(dout[(b * n.out() + start[b] + t) * n.hidden + h]);
    d_prompt[i] = sum;
  }
}

// ---- host

Sizes check_mask(const CudaCheck& check, const Tensor& mask, int64_t prompt, int64_t hidden) {
  check.that(mask.dim() == 2, "mask has shape ", Shape{mask}, ", want [B, S]");
  check.shape("mask", mask, {mask.size(0), mask.size(1)}, "the mask", mask);
  check.dtype("mask", mask, ScalarType::Long);
  return {mask.size(0), mask.size(1), prompt, hidden};
}

template <class T, class P>
void launch_concat(const Rows<T, P>& rows, const Tokens& tokens, const Sizes& n, int device, cudaStream_t stream) {
  if (n.batch == 0) return;
  const int64_t pieces = n.out() * pieces_of<T>(n.hidden);
  const int64_t most = kBlocksPerProcessor * processors_of(device) / n.batch + 1,
                needed = blocks_for(pieces, kThreads / kWarp);
  // Every warp of a batch row moves as many pieces, but for the last ones.
  const int64_t each = blocks_for(needed, most), blocks = each ? blocks_for(needed, each) : 0;
  const dim3 grid(static_cast<unsigned>(1 + blocks), static_cast<unsigned>(n.batch < kMostRows ? n.batch : kMostRows));
  if (aligned({rows.source, rows.prompt, rows.out}, n.hidden * static_cast<int64_t>(sizeof(T))))
    concat_kernel<T, P, true><<<grid, kThreads, 0, stream>>>(rows, tokens, n);
  else
    concat_kernel<T, P, false><<<grid, kThreads, 0, stream>>>(rows, tokens, n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_concat_forward(const std::optional<Tensor>& ids, const Tensor& source,
                                                                 const Tensor& prompt, const Tensor& mask,
                                                                 const std::optional<Tensor>& labels) {
  const CudaCheck check("prompt_concat_forward");
  check.that(prompt.dim() == 2, "prompt has shape ", Shape{prompt}, ", want [T, H]");
  const Sizes n = check_mask(check, mask, prompt.size(0), prompt.size(1));
  check.shape("prompt", prompt, {n.prompt, n.hidden}, "the mask", mask);
  if (ids.has_value()) {
    check.that(source.dim() == 2, "table has shape ", Shape{source}, ", want [V, H]");
    check.shape("table", source, {source.size(0), n.hidden}, "the mask", mask);
    check.shape("ids", *ids, {n.batch, n.length}, "the mask", mask);
    check.dtype("ids", *ids, ScalarType::Long);
  } else {
    check.shape("embeds", source, {n.batch, n.length, n.hidden}, "the mask", mask);
  }
  if (labels.has_value()) {
    check.shape("labels", *labels, {n.batch, n.length}, "the mask", mask);
    check.dtype("labels", *labels, ScalarType::Long);
  }
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  Tensor out = empty(source, {n.batch, n.out(), n.hidden});
  Tensor mask_out = empty(mask, {n.batch, n.out()});
  Tensor positions = empty(mask, {n.batch, n.out()});
  Tensor labels_out = labels.has_value() ? empty(mask, {n.batch, n.out()}) : empty(mask, {0});
  const Tokens tokens{data<int64_t>(mask), labels.has_value() ? data<int64_t>(*labels) : nullptr,
                      data<int64_t>(mask_out), data<int64_t>(positions), data<int64_t>(labels_out)};
  check.with_dtype(ids.has_value() ? "table" : "embeds", source, [&](auto* t) {
    check.with_dtype("prompt", prompt, [&](auto* p) {
      using T = std::remove_pointer_t<decltype(t)>;
      using P = std::remove_pointer_t<decltype(p)>;
      const Rows<T, P> rows{ids.has_value() ? data<int64_t>(*ids) : nullptr, data<T>(source), source.size(0),
                            data<P>(prompt), data<T>(out)};
      launch_concat(rows, tokens, n, mask.get_device_index(), stream_of(mask));
    });
  });
  return {out, mask_out, positions, labels_out};
}

template <class T>
void launch_backward(const Tensor& dout, const Tensor& start, const Sizes& n, const Tensor& d_prompt,
                     const Tensor* d_embeds, cudaStream_t stream) {
  const T* from = data<T>(dout);
  if (n.prompt * n.hidden > 0) {
    d_prompt_kernel<T><<<blocks_for(n.prompt * n.hidden, kThreads), kThreads, 0, stream>>>(from, data<int64_t>(start),
                                                                                           n, data<float>(d_prompt));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t pieces = n.batch * n.length * pieces_of<T>(n.hidden);
  if (d_embeds == nullptr || pieces == 0) return;
  const unsigned blocks = blocks_for(pieces, kThreads / kWarp);
  T* to = data<T>(*d_embeds);
  if (aligned({from, to}, n.hidden * static_cast<int64_t>(sizeof(T))))
    d_embeds_kernel<T, true><<<blocks, kThreads, 0, stream>>>(from, data<int64_t>(start), n, to);
  else
    d_embeds_kernel<T, false><<<blocks, kThreads, 0, stream>>>(from, data<int64_t>(start), n, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> prompt_concat_backward(const Tensor& dout, const Tensor& mask, int64_t prompt_length,
                                                  bool need_embeds) {
  const CudaCheck check("prompt_concat_backward");
  check.that(dout.dim() == 3, "dout has shape ", Shape{dout}, ", want [B, T + S, H]");
  check.that(prompt_length >= 0, "T is ", prompt_length, ", want at least 0");
  const Sizes n = check_mask(check, mask, prompt_length, dout.size(2));
  check.shape("dout", dout, {n.batch, n.out(), n.hidden}, "the mask", mask);
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  Tensor start = empty(mask, {n.batch});
  Tensor d_prompt = empty(dout, {n.prompt, n.hidden}, ScalarType::Float);
  Tensor d_embeds = need_embeds ? empty(dout, {n.batch, n.length, n.hidden}) : empty(dout, {0});
  const cudaStream_t stream = stream_of(mask);
  if (n.batch > 0) {
    start_kernel<<<blocks_for(n.batch, 1), kThreads, 0, stream>>>(data<int64_t>(mask), n, data<int64_t>(start));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  check.with_dtype("dout", dout, [&](auto* t) {
    launch_backward<std::remove_pointer_t<decltype(t)>>(dout, start, n, d_prompt, need_embeds ? &d_embeds : nullptr,
                                                        stream);
  });
  return {d_prompt, d_embeds};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cuda, m) {
  m.def(
      "prompt_concat_forward(Tensor? ids, Tensor source, Tensor prompt, Tensor mask, Tensor? labels) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("prompt_concat_backward(Tensor dout, Tensor mask, int T, bool need_embeds) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cuda, CUDA, m) {
  m.impl("prompt_concat_forward", TORCH_BOX(&peftkern::prompt_concat_forward));
  m.impl("prompt_concat_backward", TORCH_BOX(&peftkern::prompt_concat_backward));
}
