// What both backends do with tensors: on the LibTorch stable ABI, so that one binary serves every torch >= 2.10.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <ostream>

namespace peftkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A shape in a message: text is made only where a check has failed.
struct Shape {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.t.dim(); ++i) out << (i ? ", " : "") << shape.t.size(i);
  return out << "]";
}
struct Wanted {
  std::initializer_list<int64_t> sizes;
};
inline std::ostream& operator<<(std::ostream& out, const Wanted& shape) {
  out << "[";
  for (const int64_t& n : shape.sizes) out << (&n == shape.sizes.begin() ? "" : ", ") << n;
  return out << "]";
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> want) {
  if (t.dim() != static_cast<int64_t>(want.size())) return false;
  int64_t i = 0;
  for (int64_t n : want)
    if (t.size(i++) != n) return false;
  return true;
}

// An uninitialised contiguous tensor on the device of `like`. torch::stable::new_empty looks its operator up by name
// and goes through the whole dispatcher: half of what a small call costs.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  constexpr size_t kMostDims = 4;
  STD_TORCH_CHECK(shape.size() <= kMostDims, "empty: ", shape.size(), " dimensions, want at most ", kMostDims);
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = shape.size(); i-- > 0;) strides[i] = stride, stride *= shape.begin()[i];
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, dtype,
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty(like, shape, like.scalar_type());
}

}  // namespace peftkern
