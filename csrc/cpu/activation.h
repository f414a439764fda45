// The bottleneck's activations and their derivatives on vectors of f32. Read once per instruction set.
// Polynomials are our own minimax fits (Lawson's iteration on mpmath values), of the forms named beside them.

#include "exponential.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

PEFTKERN_INLINE vf magnitude(vf x) { return as_float(as_bits(x) & 0x7fffffffu); }
PEFTKERN_INLINE vf with_sign_of(vf x, vf sign) { return as_float(as_bits(x) | (as_bits(sign) & 0x80000000u)); }

struct Activated {
  vf value, slope;
};

// x Phi(x) and Phi(x) + x phi(x). Phi(-|x|) = exp(-x^2 / 2) t q(t), t = 1 / (1 + 0.34 |x|): the form of Abramowitz and
// Stegun 7.1.26 with a higher degree; relative error below 4e-7 in both tails.
PEFTKERN_INLINE Activated gelu(vf x) {
  static constexpr float kTail[] = {2.19999803e-6f, 0.13556916f, 0.13661976f,  0.11240918f, 0.1247484f,
                                    -0.06484535f,   0.22971282f, -0.29636477f, 0.15050626f, -0.028357526f};
  const vf square = x * x;
  const vf bell = exp_of_negative(square * splat(-0.5f));
  const vf t = splat(1.0f) / (splat(1.0f) + splat(0.34f) * magnitude(x));
  const vf lower = bell * polynomial(t, kTail);
  const vf cdf = select(x > vf{}, splat(1.0f) - lower, lower);
  return {x * cdf, cdf + x * bell * splat(0.398942280f)};
}

// x sigmoid(x) and its slope; exp is taken of -|x| only, so nothing overflows.
PEFTKERN_INLINE Activated silu(vf x) {
  const vf e = exp_of_negative(-magnitude(x));
  const vf sigmoid = select(x < vf{}, e, splat(1.0f)) / (splat(1.0f) + e);
  return {x * sigmoid, sigmoid * (splat(1.0f) + x * (splat(1.0f) - sigmoid))};
}

// x + x^3 q(x^2) near 0, elsewhere 1 - 2 / (exp(2 |x|) + 1) with the sign of x.
PEFTKERN_INLINE Activated tanh(vf x) {
  static constexpr float kOdd[] = {-0.33333282f, 0.13331442f, -0.053739714f, 0.02063909f, -0.005704993f};
  const vf a = magnitude(x), square = x * x;
  const vf e = exp_of_negative(a * splat(-2.0f));
  const vf far = with_sign_of((splat(1.0f) - e) / (splat(1.0f) + e), x);
  const vf near = x + x * square * polynomial(square, kOdd);
  const vf value = select(a < splat(0.625f), near, far);
  return {value, splat(1.0f) - value * value};
}

PEFTKERN_INLINE Activated relu(vf x) {
  // NaN stays NaN, as in torch.
  const vi below = x <= vf{};
  return {select(below, vf{}, x), select(below, vf{}, splat(1.0f))};
}

// value (and slope, if not null) of n pre-activations.
template <class F>
void activate_with(const float* pre, int64_t n, float* value, float* slope, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Activated a = f(left >= kLanes ? load(pre + i) : load_part(pre + i, left));
    if (left >= kLanes) {
      store(value + i, a.value);
      if (slope) store(slope + i, a.slope);
    } else {
      store_part(value + i, a.value, left);
      if (slope) store_part(slope + i, a.slope, left);
    }
  }
}

void activate(Activation kind, const float* pre, int64_t n, float* value, float* slope) {
  switch (kind) {
    case Activation::relu:
      return activate_with(pre, n, value, slope, [](vf x) { return relu(x); });
    case Activation::gelu:
      return activate_with(pre, n, value, slope, [](vf x) { return gelu(x); });
    case Activation::silu:
      return activate_with(pre, n, value, slope, [](vf x) { return silu(x); });
    case Activation::tanh:
      return activate_with(pre, n, value, slope, [](vf x) { return tanh(x); });
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
