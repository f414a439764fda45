// Argument checks of the CPU ops, and what these take from and give to tensors.
#pragma once

#include <initializer_list>
#include <optional>

#include "../check.h"
#include "common.h"

namespace peftkern {

class CpuCheck : public Check {
 public:
  using Check::Check;

  // A CPU tensor of this shape; rows may be strided if `row_strided`, everything else is contiguous.
  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want, bool row_strided = false) const {
    that(t.is_cpu(), name, " is not on the CPU");
    layout(name, t, want, row_strided);
  }
  void dims(const char* name, const Tensor& t, int64_t want) const {
    that(t.dim() == want, name, " has ", t.dim(), " dimensions, want ", want);
  }
  Dtype floating(const char* name, const Tensor& t) const {
    const ScalarType type = Check::floating(name, t);
    return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
  }
  // M, K, N and R are at least 1: callers handle empty problems.
  void positive(const char* name, int64_t n) const { that(n >= 1, name, " is ", n, ", want at least 1"); }

  Dropout dropout(double p, const std::optional<Tensor>& seed) const {
    that(p >= 0.0 && p < 1.0, "p is ", p, ", want 0 <= p < 1");
    Dropout d;
    if (p == 0.0) return d;
    that(seed.has_value(), "seed is None, want an int64 tensor of one element because p is ", p);
    that(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed has shape ",
         Shape{*seed}, ", want an int64 CPU tensor of one element");
    d.on = true;
    d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    const double rounded = p * 65536.0 + 0.5;
    d.threshold = rounded >= 65535.0 ? 65535 : static_cast<uint16_t>(rounded);
    d.inverse_keep = 65536.0f / static_cast<float>(65536 - d.threshold);
    return d;
  }
  Matrix matrix(const char* name, const Tensor& t) const {
    const Dtype type = floating(name, t);
    return {const_cast<void*>(t.const_data_ptr()), type, t.stride(0), 1};
  }
};

inline Tensor empty_f32(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty(like, shape, ScalarType::Float);
}
inline Matrix f32_matrix(const Tensor& t) { return {t.mutable_data_ptr(), Dtype::f32, t.stride(0), 1}; }

}  // namespace peftkern
