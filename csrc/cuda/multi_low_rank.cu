// y += s_i * (x A_i^T) B_i^T for a few rows and many adapters, as one decoding step has them; no backward and no
// dropout. Bound by reading each A_i and B_i once, and by two launches.
//
// Source of the method: Chen et al. 2023 (Punica, arXiv:2310.18547), for BGMV.
#include <algorithm>

#include "common.cuh"

namespace peftkern {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 8;        // rows of one adapter taken at a time: A_i and B_i are read once for so many
constexpr int kPiece = 8;       // elements that a thread reads at a time: 16 bytes of a 16-bit type
constexpr int kRankChunk = 32;  // columns of B_i for which h waits in shared memory
constexpr int kBlocksPerProcessor = 4;
constexpr int kColumns = 5;  // of the table: address of A, address of B, rank, ranks before it, bits of the scale
constexpr int64_t kMostRows = 64;

struct Problem {
  int64_t m, k, n, most, stride_x, per_entry;  // most: the largest rank; per_entry: rows per entry of index
  const int64_t* cells;
  const int64_t* index;
};

// kPiece elements from an address that is a multiple of 16 bytes.
template <class T>
__device__ void load_piece(const T* from, float (&to)[kPiece]) {
  constexpr int kWords = kPiece * static_cast<int>(sizeof(T)) / 16;
  alignas(16) T values[kPiece];
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    reinterpret_cast<uint4*>(values)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) to[i] = to_float(values[i]);
}

// The adapter's rows number kRows * group and following into `rows`, and how many, at most kRows. All threads of the
// block call it; it ends in a barrier.
__device__ int find_rows(const Problem& op, int64_t adapter, int64_t group, int64_t* rows) {
  __shared__ int found;
  if (threadIdx.x < kWarp) {
    int place = -static_cast<int>(group) * kRows;  // of the next row that is found
    for (int64_t m = 0; m < op.m && place < kRows; m += kWarp) {
      const int64_t mine = m + threadIdx.x;
      const bool is_mine = mine < op.m && op.index[mine / op.per_entry] == adapter;
      const unsigned all = __ballot_sync(0xffffffffu, is_mine);
      const int own = place + __popc(all & ((1u << threadIdx.x) - 1u));
      if (is_mine && own >= 0 && own < kRows) rows[own] = mine;
      place += __popc(all);
    }
    if (threadIdx.x == 0) found = place < 0 ? 0 : place < kRows ? place : kRows;
  }
  __syncthreads();
  return found;
}

// Runs f(count) for every group blockIdx.z + i * gridDim.z of the adapter's rows, which are then in `rows`.
template <class F>
__device__ void for_groups(const Problem& op, int64_t adapter, int64_t* rows, const F& f) {
  int count = kRows;
  for (int64_t group = blockIdx.z; count == kRows && group * kRows < op.m; group += gridDim.z) {
    count = find_rows(op, adapter, group, rows);
    if (count > 0) f(count);
    __syncthreads();  // before `rows` is written again
  }
}

// h[m, r] = x[m] . A_i[r]: a block a rank, which reads its row of A_i once for up to kRows rows of x; its warps share
// K.
template <class T, class P, bool VECTOR>
__global__ void shrink_kernel(Problem op, const T* x, float* h) {
  __shared__ int64_t rows[kRows];
  __shared__ float sums[kWarps][kRows];
  const int64_t adapter = blockIdx.x, rank = blockIdx.y;
  const int64_t* cell = op.cells + adapter * kColumns;
  if (rank >= cell[2]) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const P* a = reinterpret_cast<const P*>(cell[0]) + rank * op.k;
  for_groups(op, adapter, rows, [&](int count) {
    float acc[kRows] = {};
    if constexpr (VECTOR) {
      for (int64_t c = static_cast<int64_t>(threadIdx.x) * kPiece; c < op.k; c += kThreads * kPiece) {
        float w[kPiece], v[kRows][kPiece] = {};  // all loads on their way before the first is waited for
        load_piece(a + c, w);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (i < count) load_piece(x + rows[i] * op.stride_x + c, v[i]);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kPiece; ++j) acc[i] += v[i][j] * w[j];
      }
    } else {
      for (int64_t c = threadIdx.x; c < op.k; c += kThreads) {
        const float w = to_float(a[c]);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (i < count) acc[i] += to_float(x[rows[i] * op.stride_x + c]) * w;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int step = kWarp / 2; step > 0; step /= 2) acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], step);
      if (lane == 0) sums[warp][i] = acc[i];
    }
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(count)) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += sums[w][threadIdx.x];
      h[rows[threadIdx.x] * op.most + rank] = sum;
    }
  });
}

// y[m, n] += s_i * (h[m] . B_i[n]): a thread a column n, which reads its row of B_i once for up to kRows rows of y.
template <class T, class P, bool VECTOR>
__global__ void expand_kernel(Problem op, const float* h, T* y) {
  __shared__ int64_t rows[kRows];
  __shared__ float chunk[kRows][kRankChunk];
  const int64_t adapter = blockIdx.x;
  const int64_t* cell = op.cells + adapter * kColumns;
  const int64_t rank = cell[2], n = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const float scale = __int_as_float(static_cast<int>(cell[4]));
  const P* b = reinterpret_cast<const P*>(cell[1]) + n * rank;
  for_groups(op, adapter, rows, [&](int count) {
    float acc[kRows] = {};
    for (int64_t r0 = 0; r0 < rank; r0 += kRankChunk) {
      const int width = static_cast<int>(rank - r0 < kRankChunk ? rank - r0 : kRankChunk);
      __syncthreads();
      for (int i = threadIdx.x; i < count * kRankChunk; i += kThreads) {
        const int row = i / kRankChunk, r = i % kRankChunk;
        chunk[row][r] = r < width ? h[rows[row] * op.most + r0 + r] : 0.0f;
      }
      __syncthreads();
      if (n >= op.n) continue;
      if constexpr (VECTOR) {
        for (int r = 0; r < width; r += kPiece) {
          float w[kPiece];
          load_piece(b + r0 + r, w);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (i >= count) break;
#pragma unroll
            for (int j = 0; j < kPiece; ++j) acc[i] += chunk[i][r + j] * w[j];
          }
        }
      } else {
        for (int r = 0; r < width; ++r) {
          const float w = to_float(b[r0 + r]);
#pragma unroll
          for (int i = 0; i < kRows; ++i)
            if (i < count) acc[i] += chunk[i][r] * w;
        }
      }
    }
    if (n >= op.n) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= count) break;
      T* to = y + rows[i] * op.n + n;
      from_float(to_float(*to) + scale * acc[i], to);
    }
  });
}

// ---- host

constexpr CudaCheck check("multi_low_rank_forward");

// f(null pointer of the adapters' type); codes 0 f32, 1 bf16, 2 f16.
template <class F>
void with_code(int64_t code, const F& f) {
  if (code == 0) return f(static_cast<float*>(nullptr));
  if (code == 1) return f(static_cast<__nv_bfloat16*>(nullptr));
  check.that(code == 2, "dtype code ", code, ", want 0, 1 or 2");
  f(static_cast<__half*>(nullptr));
}

template <class T, class P>
void run(const Problem& op, int64_t adapters, bool vector_k, bool vector_r, const Tensor& x, const Tensor& h,
         const Tensor& y, cudaStream_t stream) {
  const T* from = data<T>(x);
  float* latent = data<float>(h);
  T* to = data<T>(y);
  const auto grid = [&](int64_t blocks) {
    // As many groups at once as an adapter has with its even share of the rows, or as fill the device where one has
    // more; one after another beyond.
    const unsigned even = blocks_for(op.m, kRows * adapters), most = blocks_for(op.m, kRows);
    const auto filling =
        static_cast<unsigned>(kBlocksPerProcessor * processors_of(x.get_device_index()) / (adapters * blocks));
    return dim3(static_cast<unsigned>(adapters), static_cast<unsigned>(blocks),
                std::min(most, std::max(even, filling)));
  };
  const dim3 ranks = grid(op.most), columns = grid((op.n + kThreads - 1) / kThreads);
  if (vector_k)
    shrink_kernel<T, P, true><<<ranks, kThreads, 0, stream>>>(op, from, latent);
  else
    shrink_kernel<T, P, false><<<ranks, kThreads, 0, stream>>>(op, from, latent);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (vector_r)
    expand_kernel<T, P, true><<<columns, kThreads, 0, stream>>>(op, latent, to);
  else
    expand_kernel<T, P, false><<<columns, kThreads, 0, stream>>>(op, latent, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor multi_low_rank_forward(const Tensor& x, const Tensor& table, const Tensor& index, const Tensor& y, int64_t most,
                              int64_t ranks, int64_t dtype, bool addresses_aligned, double p,
                              const std::optional<Tensor>& seed) {
  (void)seed;
  check.that(p == 0.0, "p is ", p, ", and this kernel has no dropout");
  check.that(x.dim() == 2 && y.dim() == 2 && table.dim() == 2 && index.dim() == 1,
             "want x, y, table 2-D and index 1-D");
  const int64_t m = x.size(0), k = x.size(1), n = y.size(1), adapters = table.size(0), entries = index.size(0);
  check.shape("x", x, {m, k}, "x", x, true);
  check.shape("y", y, {m, n}, "x", x);
  check.shape("table", table, {adapters, kColumns}, "x", x);
  check.shape("index", index, {entries}, "x", x);
  check.dtype("y", y, x.scalar_type());
  check.dtype("table", table, ScalarType::Long);
  check.dtype("index", index, ScalarType::Long);
  check.that(m > 0 && k > 0 && n > 0 && most > 0 && adapters > 0, "empty problems are the caller's");
  check.that(entries > 0 && m % entries == 0, "index does not divide the rows of x");
  check.that((n + kThreads - 1) / kThreads < 65536 && most < 65536 && m <= kMostRows, "M, N or R is too large");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_of(x);
  Tensor h = empty(x, {m, most}, ScalarType::Float);
  const cudaError_t cleared =
      cudaMemsetAsync(h.mutable_data_ptr(), 0, static_cast<size_t>(m * most) * sizeof(float), stream);
  check.that(cleared == cudaSuccess, cudaGetErrorString(cleared));
  const Problem op{m, k, n, most, x.stride(0), m / entries, data<int64_t>(table), data<int64_t>(index)};
  const bool x_aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % kVectorBytes == 0 && x.stride(0) % kPiece == 0;
  const bool vector_k = addresses_aligned && k % kPiece == 0 && x_aligned;
  // Ranks are known to be equal where they add up to as many of the largest.
  const bool vector_r = addresses_aligned && most % kPiece == 0 && ranks == adapters * most;
  check.with_dtype("x", x, [&](auto* t) {
    with_code(dtype, [&](auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using P = std::remove_pointer_t<decltype(w)>;
      run<T, P>(op, adapters, vector_k, vector_r, x, h, y, stream);
    });
  });
  return h;
}

// Above so many rows tiles of matrix products are the better way: Triton's.
int64_t multi_low_rank_most_rows() { return kMostRows; }

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cuda, m) {
  m.def(
      "multi_low_rank_forward(Tensor x, Tensor table, Tensor index, Tensor(a!) y, int R, int ranks, int dtype, bool "
      "aligned, float p, Tensor? seed) -> Tensor");
  m.def("multi_low_rank_most_rows() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cuda, CUDA, m) {
  m.impl("multi_low_rank_forward", TORCH_BOX(&peftkern::multi_low_rank_forward));
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cuda, CompositeExplicitAutograd, m) {
  m.impl("multi_low_rank_most_rows", TORCH_BOX(&peftkern::multi_low_rank_most_rows));
}
