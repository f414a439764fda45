// y = x * s by columns, and its gradients in one reading of x and dy. Bound by memory for many rows and by the launch
// for few: 16 bytes a thread and load, the scale of a thread's columns in registers, several rows a thread.
// On the LibTorch stable ABI: compiles against any torch >= 2.10, a CPU build included.
#include "common.cuh"

namespace peftkern {
namespace {

constexpr int kRowsPerThread = 4;
constexpr int64_t kMostRowBlocks = 65535;  // the grid's y dimension ends there; kernels stride beyond
constexpr int64_t kFewestRowsPerSplit = 16;
constexpr int kProgramsPerProcessor = 2;
constexpr int kReduceWarps = 32;

// Column strides are 1; the others in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t row;
};

struct Scale {
  const void* data;
  int type;  // 0 f32, 1 bf16, 2 f16
  __device__ float at(int64_t c) const {
    if (type == 0) return static_cast<const float*>(data)[c];
    return type == 1 ? to_float(static_cast<const __nv_bfloat16*>(data)[c])
                     : to_float(static_cast<const __half*>(data)[c]);
  }
};

// WIDTH neighbouring columns, all of them inside: WIDTH divides C.
template <int WIDTH, class T>
__device__ Pack<T, WIDTH> load(const Matrix<const T>& from, int64_t m, int64_t c) {
  return *reinterpret_cast<const Pack<T, WIDTH>*>(from.data + m * from.row + c);
}

// A block is blockDim.x packs of columns by blockDim.y rows.
template <class T, int WIDTH>
__global__ void scale_kernel(Matrix<const T> x, Scale scale, Matrix<T> y, int64_t M, int64_t C) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * WIDTH;
  if (c >= C) return;
  float s[WIDTH];
  for (int i = 0; i < WIDTH; ++i) s[i] = scale.at(c + i);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t m = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; m < M; m += stride) {
    const Pack<T, WIDTH> in = load<WIDTH>(x, m, c);
    Pack<T, WIDTH> out;
    for (int i = 0; i < WIDTH; ++i) from_float(to_float(in.value[i]) * s[i], &out.value[i]);
    *reinterpret_cast<Pack<T, WIDTH>*>(y.data + m * y.row + c) = out;
  }
}

// partial[split, c] = sum of dy * x over the split's rows: a thread its own rows in order, then the threads of a column
// in order; and dx = dy * s where dx is wanted.
template <class T, int WIDTH>
__global__ void __launch_bounds__(kThreads, kProgramsPerProcessor)
    backward_kernel(Matrix<const T> dy, Matrix<const T> x, Scale scale, Matrix<T> dx, float* partial, int64_t M,
                    int64_t C, int64_t rows_per_split) {
  extern __shared__ float sums[];  // [blockDim.y, blockDim.x * WIDTH]
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * WIDTH;
  const bool inside = c < C;
  float s[WIDTH], acc[WIDTH];
  for (int i = 0; i < WIDTH; ++i) acc[i] = 0.0f, s[i] = inside ? scale.at(c + i) : 0.0f;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * rows_per_split;
  const int64_t end = first + rows_per_split < M ? first + rows_per_split : M;
  for (int64_t m0 = first + threadIdx.y; inside && m0 < end; m0 += kRowsPerThread * blockDim.y) {
    Pack<T, WIDTH> d[kRowsPerThread], v[kRowsPerThread];
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t m = m0 + k * static_cast<int64_t>(blockDim.y);
      if (m < end) d[k] = load<WIDTH>(dy, m, c), v[k] = load<WIDTH>(x, m, c);
    }
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t m = m0 + k * static_cast<int64_t>(blockDim.y);
      if (m >= end) break;
      Pack<T, WIDTH> out;
      for (int i = 0; i < WIDTH; ++i) {
        acc[i] += to_float(d[k].value[i]) * to_float(v[k].value[i]);
        from_float(to_float(d[k].value[i]) * s[i], &out.value[i]);
      }
      if (dx.data) *reinterpret_cast<Pack<T, WIDTH>*>(dx.data + m * dx.row + c) = out;
    }
  }
  const int width = blockDim.x * WIDTH;
  for (int i = 0; i < WIDTH; ++i) sums[threadIdx.y * width + threadIdx.x * WIDTH + i] = acc[i];
  __syncthreads();
  // Each row of threads sums a share of the columns.
  for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < width; j += blockDim.x * blockDim.y) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * width + j;
    if (column >= C) break;
    float sum = 0.0f;
    for (int r = 0; r < static_cast<int>(blockDim.y); ++r) sum += sums[r * width + j];
    partial[static_cast<int64_t>(blockIdx.y) * C + column] = sum;
  }
}

// out[c] = sum of partial[split, c]: each warp of a block its share of the splits in order, then the warps in order.
__global__ void reduce_kernel(const float* partial, int64_t splits, int64_t C, float* out) {
  __shared__ float sums[kReduceWarps][kWarp];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarp;
  for (int64_t c0 = static_cast<int64_t>(blockIdx.x) * kWarp; c0 < C; c0 += stride) {
    const int64_t c = c0 + threadIdx.x;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t i = threadIdx.y; c < C && i < splits; i += kReduceWarps) sum += partial[i * C + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
      for (int w = 1; w < kReduceWarps; ++w) sum += sums[w][threadIdx.x];
      out[c] = sum;
    }
    __syncthreads();
  }
}

// ---- host

struct Launch {
  dim3 threads;
  unsigned column_blocks;
  Launch(int64_t c, int width) {
    const int64_t packs = (c + width - 1) / width;
    unsigned x = kWarp;
    while (x < kThreads && static_cast<int64_t>(x) < packs) x *= 2;
    threads = dim3(x, kThreads / x);
    column_blocks = blocks_for(packs, x);
  }
};

Scale scale_of(const CudaCheck& check, const Tensor& s, int64_t c, const Tensor& like) {
  check.shape("s", s, {c}, "x", like);
  int type = 0;
  check.with_dtype("s", s, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    type = std::is_same_v<S, float> ? 0 : std::is_same_v<S, __nv_bfloat16> ? 1 : 2;
  });
  return {s.data_ptr(), type};
}

template <class T>
Matrix<T> matrix(const Tensor& t) {
  return {data<std::remove_const_t<T>>(t), t.stride(0)};
}

// Whether every row of these begins on a 16-byte boundary and is made of whole packs.
template <class T>
bool packed(int64_t c, std::initializer_list<Matrix<const T>> matrices) {
  bool ok = true;
  for (const Matrix<const T>& m : matrices)
    ok = ok && aligned({m.data}, c * static_cast<int64_t>(sizeof(T))) &&
         m.row * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  return ok;
}

template <class T, int WIDTH>
void launch_scale(Matrix<const T> x, const Scale& s, Matrix<T> y, int64_t m, int64_t c, cudaStream_t stream) {
  const Launch by(c, WIDTH);
  const int64_t rows = int64_t{by.threads.y} * kRowsPerThread, blocks = (m + rows - 1) / rows;
  const dim3 grid(by.column_blocks, static_cast<unsigned>(blocks < kMostRowBlocks ? blocks : kMostRowBlocks));
  scale_kernel<T, WIDTH><<<grid, by.threads, 0, stream>>>(x, s, y, m, c);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void scale(Matrix<const T> x, const Scale& s, Matrix<T> y, int64_t m, int64_t c, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  if (packed<T>(c, {x, {y.data, y.row}}))
    launch_scale<T, kWidth>(x, s, y, m, c, stream);
  else
    launch_scale<T, 1>(x, s, y, m, c, stream);
}

void column_scale_forward(const Tensor& x, const Tensor& s, const Tensor& y) {
  const CudaCheck check("column_scale_forward");
  check.that(x.dim() == 2, "x has shape ", Shape{x}, ", want [M, C]");
  const int64_t m = x.size(0), c = x.size(1);
  check.shape("x", x, {m, c}, "x", x, true);
  check.shape("y", y, {m, c}, "x", x);
  check.dtype("y", y, x.scalar_type());
  const Scale factors = scale_of(check, s, c, x);
  if (m == 0 || c == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check.with_dtype("x", x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    scale<T>(matrix<const T>(x), factors, matrix<T>(y), m, c, stream_of(x));
  });
}

// Splits of the rows: enough programs to fill the device, each with rows enough for its partial sums to cost little.
int64_t row_splits(int64_t m, unsigned column_blocks, int device) {
  const int64_t wanted = kProgramsPerProcessor * processors_of(device) / column_blocks;
  const int64_t affordable = m / kFewestRowsPerSplit;
  const int64_t splits = wanted < affordable ? wanted : affordable;
  return splits < 1 ? 1 : splits < kMostRowBlocks ? splits : kMostRowBlocks;
}

template <class T, int WIDTH>
void launch_backward(Matrix<const T> dy, Matrix<const T> x, const Scale& s, Matrix<T> dx, const Tensor& ds, int64_t m,
                     int64_t c, cudaStream_t stream) {
  const Launch by(c, WIDTH);
  const int64_t wanted = row_splits(m, by.column_blocks, ds.get_device_index());
  const int64_t rows = (m + wanted - 1) / wanted, splits = (m + rows - 1) / rows;
  Tensor partial = splits > 1 ? empty(ds, {splits, c}) : ds;
  const dim3 grid(by.column_blocks, static_cast<unsigned>(splits));
  const size_t shared = size_t{kThreads} * WIDTH * sizeof(float);
  backward_kernel<T, WIDTH><<<grid, by.threads, shared, stream>>>(dy, x, s, dx, data<float>(partial), m, c, rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (splits == 1) return;
  const dim3 threads(kWarp, kReduceWarps);
  reduce_kernel<<<blocks_for(c, kWarp), threads, 0, stream>>>(data<float>(partial), splits, c, data<float>(ds));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> column_scale_backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& s,
                                                 bool need_dx) {
  const CudaCheck check("column_scale_backward");
  check.that(dy.dim() == 2, "dy has shape ", Shape{dy}, ", want [M, C]");
  const int64_t m = dy.size(0), c = dy.size(1);
  check.that(m > 0 && c > 0, "dy has shape ", Shape{dy}, ", want at least one element");
  check.shape("dy", dy, {m, c}, "dy", dy, true);
  const Scale factors = scale_of(check, s, c, dy);
  if (x.has_value()) {
    check.shape("x", *x, {m, c}, "dy", dy, true);
    check.dtype("x", *x, dy.scalar_type());
  }
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Tensor dx = need_dx ? empty(dy, {m, c}) : empty(dy, {0});
  Tensor ds = empty(dy, {x.has_value() ? c : 0}, ScalarType::Float);
  const cudaStream_t stream = stream_of(dy);
  check.with_dtype("dy", dy, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Matrix<const T> upstream = matrix<const T>(dy);
    const Matrix<T> out = need_dx ? matrix<T>(dx) : Matrix<T>{nullptr, c};
    if (!x.has_value()) {
      if (need_dx) scale<T>(upstream, factors, out, m, c, stream);
      return;
    }
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const Matrix<const T> in = matrix<const T>(*x);
    if (packed<T>(c, {upstream, in, {out.data, out.row}}))
      launch_backward<T, kWidth>(upstream, in, factors, out, ds, m, c, stream);
    else
      launch_backward<T, 1>(upstream, in, factors, out, ds, m, c, stream);
  });
  return {dx, ds};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cuda, m) {
  m.def("column_scale_forward(Tensor x, Tensor s, Tensor(a!) y) -> ()");
  m.def("column_scale_backward(Tensor dy, Tensor? x, Tensor s, bool need_dx) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cuda, CUDA, m) {
  m.impl("column_scale_forward", TORCH_BOX(&peftkern::column_scale_forward));
  m.impl("column_scale_backward", TORCH_BOX(&peftkern::column_scale_backward));
}
