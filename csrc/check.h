// Argument checks of the ops. Every message names the op, the argument, what came and what was wanted.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "tensor.h"

namespace peftkern {

// One op's checks that hold on every device.
class Check {
 public:
  explicit constexpr Check(const char* op) : op_(op) {}

  template <class... Words>
  void that(bool ok, const Words&... words) const {
    if (ok) return;
    std::ostringstream message;  // STD_TORCH_CHECK would begin every message with this line's place
    ((message << op_ << ": ") << ... << words);
    throw std::runtime_error(message.str());
  }
  // Of this shape; rows may be strided if `row_strided`, everything else is contiguous.
  void layout(const char* name, const Tensor& t, std::initializer_list<int64_t> want, bool row_strided) const {
    that(has_shape(t, want), name, " has shape ", Shape{t}, ", want ", Wanted{want});
    if (row_strided)
      that(t.size(1) == 1 || t.stride(1) == 1, name, " has stride ", t.stride(1), " in dimension 1, want 1");
    else
      that(t.is_contiguous(), name, " is not contiguous");
  }
  void dtype(const char* name, const Tensor& t, ScalarType want) const {
    that(t.scalar_type() == want, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", want ",
         torch::headeronly::toString(want));
  }
  // Float, BFloat16 or Half.
  ScalarType floating(const char* name, const Tensor& t) const {
    const ScalarType type = t.scalar_type();
    const bool ok = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
    that(ok, name, " has dtype ", torch::headeronly::toString(type), ", want Float, BFloat16 or Half");
    return type;
  }

 private:
  const char* op_;
};

}  // namespace peftkern
