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

// One block a row: start[b] is the first nonzero of mask[b], or 0; then mask, positions and labels of the new row.
__global__ void rows_kernel(const int64_t* mask, const int64_t* labels, Sizes n, int64_t* start, int64_t* mask_out,
                            int64_t* positions, int64_t* labels_out) {
  __shared__ unsigned long long first;
  __shared__ int64_t warp_sums[kThreads / kWarp];
  __shared__ int64_t carried;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t b = blockIdx.x; b < n.batch; b += gridDim.x) {
    if (threadIdx.x == 0) first = static_cast<unsigned long long>(n.length), carried = 0;
    __syncthreads();
    for (int64_t s = threadIdx.x; s < n.length; s += kThreads) {
      if (mask[b * n.length + s] == 0) continue;
      atomicMin(&first, static_cast<unsigned long long>(s));
      break;
    }
    __syncthreads();
    const int64_t begin = static_cast<int64_t>(first) == n.length ? 0 : static_cast<int64_t>(first);
    if (threadIdx.x == 0) start[b] = begin;
    // An inclusive prefix sum of the new mask, kThreads positions at a time.
    for (int64_t j0 = 0; j0 < n.out(); j0 += kThreads) {
      const int64_t j = j0 + threadIdx.x;
      const bool inside = j < n.out(), is_prompt = j >= begin && j < begin + n.prompt;
      const int64_t from = b * n.length + (j < begin ? j : j - n.prompt), to = b * n.out() + j;
      const int64_t own = !inside ? 0 : is_prompt ? 1 : mask[from];
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
        mask_out[to] = own;
        positions[to] = total > 0 ? total - 1 : 0;
        if (labels) labels_out[to] = is_prompt ? -100 : labels[from];
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// Finds out which source row an output row is; shared by the embeddings' forward pass.
template <class T, class P>
struct Rows {
  const int64_t* ids;  // null: source is [B, S, H]
  const T* source;
  int64_t vocabulary;
  const P* prompt;
  const int64_t* start;
  Sizes n;
};

// One warp copies a row of aligned vectors; so many loads a lane are on their way before the first store.
template <class T>
__device__ inline void copy_row(const T* from, T* to, int64_t hidden, int lane) {
  constexpr int kInFlight = 8;
  const int64_t vectors = hidden * static_cast<int64_t>(sizeof(T)) / kVectorBytes;
  const uint4* in = reinterpret_cast<const uint4*>(from);
  uint4* out = reinterpret_cast<uint4*>(to);
  int64_t v = lane;
  for (; v + (kInFlight - 1) * kWarp < vectors; v += kInFlight * kWarp) {
    uint4 held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) held[i] = __ldg(in + v + i * kWarp);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) out[v + i * kWarp] = held[i];
  }
  for (; v < vectors; v += kWarp) out[v] = __ldg(in + v);
}

// A warp a row. Rows of the source are copied 16 bytes a lane where everything is aligned (VECTOR), prompt rows are
// converted element by element unless they have the same dtype.
template <class T, class P, bool VECTOR>
__global__ void embeds_kernel(Rows<T, P> rows, T* out) {
  const Sizes n = rows.n;
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; i < n.batch * n.out();
       i += stride) {
    const int64_t b = i / n.out(), j = i % n.out(), t = j - rows.start[b];
    T* to = out + i * n.hidden;
    const bool is_prompt = t >= 0 && t < n.prompt;
    const T* from = nullptr;
    if (is_prompt) {
      if constexpr (std::is_same_v<T, P>) {
        from = rows.prompt + t * n.hidden;
      } else {
        const P* p = rows.prompt + t * n.hidden;
#pragma unroll 8
        for (int64_t h = lane; h < n.hidden; h += kWarp) {
          T element;
          from_float(to_float(__ldg(p + h)), &element);
          to[h] = element;
        }
        continue;
      }
    } else {
      int64_t row = b * n.length + (t < 0 ? j : j - n.prompt);
      if (rows.ids) {
        row = rows.ids[row];
        assert(row >= 0 && row < rows.vocabulary && "prompt_concat: id out of range");
      }
      from = rows.source + row * n.hidden;
    }
    if constexpr (VECTOR) {
      copy_row(from, to, n.hidden, lane);
    } else {
      for (int64_t h = lane; h < n.hidden; h += kWarp) to[h] = from[h];
    }
  }
}

// d_embeds: a warp a row, the forward copy backwards.
template <class T, bool VECTOR>
__global__ void d_embeds_kernel(const T* dout, const int64_t* start, Sizes n, T* d_embeds) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; i < n.batch * n.length;
       i += stride) {
    const int64_t b = i / n.length, s = i % n.length;
    const T* from = dout + (b * n.out() + (s < start[b] ? s : s + n.prompt)) * n.hidden;
    T* to = d_embeds + i * n.hidden;
    if constexpr (VECTOR) {
      copy_row(from, to, n.hidden, lane);
    } else {
      for (int64_t h = lane; h < n.hidden; h += kWarp) to[h] = from[h];
    }
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

__global__ void start_kernel(const int64_t* mask, Sizes n, int64_t* start) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; b < n.batch;
       b += stride) {
    int64_t found = 0;
    for (int64_t s0 = 0; s0 < n.length; s0 += kWarp) {
      const int64_t s = s0 + lane;
      const unsigned ones = __ballot_sync(0xffffffffu, s < n.length && mask[b * n.length + s] != 0);
      if (ones == 0) continue;
      found = s0 + __ffs(static_cast<int>(ones)) - 1;
      break;
    }
    if (lane == 0) start[b] = found;
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
void launch_embeds(const Rows<T, P>& rows, const Tensor& out, cudaStream_t stream) {
  const int64_t count = rows.n.batch * rows.n.out();
  if (count == 0 || rows.n.hidden == 0) return;
  const unsigned blocks = blocks_for(count, kThreads / kWarp);
  T* to = data<T>(out);
  if (aligned({rows.source, rows.prompt, to}, rows.n.hidden * static_cast<int64_t>(sizeof(T))))
    embeds_kernel<T, P, true><<<blocks, kThreads, 0, stream>>>(rows, to);
  else
    embeds_kernel<T, P, false><<<blocks, kThreads, 0, stream>>>(rows, to);
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
  Tensor start = empty(mask, {n.batch});
  Tensor mask_out = empty(mask, {n.batch, n.out()});
  Tensor positions = empty(mask, {n.batch, n.out()});
  Tensor labels_out = labels.has_value() ? empty(mask, {n.batch, n.out()}) : empty(mask, {0});
  const cudaStream_t stream = stream_of(mask);
  if (n.batch > 0) {
    rows_kernel<<<blocks_for(n.batch, 1), kThreads, 0, stream>>>(
        data<int64_t>(mask), labels.has_value() ? data<int64_t>(*labels) : nullptr, n, data<int64_t>(start),
        data<int64_t>(mask_out), data<int64_t>(positions), labels.has_value() ? data<int64_t>(labels_out) : nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  check.with_dtype(ids.has_value() ? "table" : "embeds", source, [&](auto* t) {
    check.with_dtype("prompt", prompt, [&](auto* p) {
      using T = std::remove_pointer_t<decltype(t)>;
      using P = std::remove_pointer_t<decltype(p)>;
      const Rows<T, P> rows{ids.has_value() ? data<int64_t>(*ids) : nullptr,
                            data<T>(source),
                            source.size(0),
                            data<P>(prompt),
                            data<int64_t>(start),
                            n};
      launch_embeds(rows, out, stream);
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
  const int64_t count = n.batch * n.length;
  if (d_embeds == nullptr || count == 0 || n.hidden == 0) return;
  const unsigned blocks = blocks_for(count, kThreads / kWarp);
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
    start_kernel<<<blocks_for(n.batch, kThreads / kWarp), kThreads, 0, stream>>>(data<int64_t>(mask), n,
                                                                                 data<int64_t>(start));
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
