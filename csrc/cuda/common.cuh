// What the CUDA ops share: conversions, checks, launches. Compiles against a CPU build of torch, too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../check.h"

namespace peftkern {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int64_t kMostBlocks = int64_t{1} << 30;  // the grid's x dimension ends at 2^31 - 1; kernels stride beyond

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }

// WIDTH neighbouring elements, read and written 16 bytes at a time.
template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH < kVectorBytes ? sizeof(T) * WIDTH : kVectorBytes) Pack {
  T value[WIDTH];
};

inline int64_t processors_of(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

class CudaCheck : public Check {
 public:
  using Check::Check;

  // A tensor of this shape on the device of `like`; rows may be strided if `row_strided`, all else is contiguous.
  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want, const char* like_name,
             const Tensor& like, bool row_strided = false) const {
    that(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " is not on the CUDA device of ",
         like_name);
    layout(name, t, want, row_strided);
  }
  // Calls f with a null pointer of the tensor's element type.
  template <class F>
  void with_dtype(const char* name, const Tensor& t, const F& f) const {
    const ScalarType type = floating(name, t);
    if (type == ScalarType::Float) return f(static_cast<float*>(nullptr));
    if (type == ScalarType::BFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
    f(static_cast<__half*>(nullptr));
  }
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

inline bool aligned(std::initializer_list<const void*> pointers, int64_t row_bytes) {
  bool ok = row_bytes % kVectorBytes == 0;
  for (const void* p : pointers) ok = ok && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
  return ok;
}

}  // namespace
}  // namespace peftkern
