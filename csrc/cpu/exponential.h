// exp on vectors of f32. Read once per instruction set; the polynomial is our own minimax fit (Lawson's iteration on
// mpmath values).

namespace peftkern::PEFTKERN_ISA {
namespace {

template <int N>
PEFTKERN_INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf sum = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = sum * x + splat(c[i]);
  return sum;
}

// exp(x) for x <= 0, to 1 ulp; 0 below -87.3, where f32 goes subnormal. exp(r) = 1 + r + r^2 q(r) after the reduction
// x = n ln 2 + r in two parts (Cody and Waite, "Software Manual for the Elementary Functions", 1980).
PEFTKERN_INLINE vf exp_of_negative(vf x) {
  static constexpr float kTail[] = {0.49999993f, 0.1666652f, 0.041668395f, 0.0083687865f, 0.0013814424f};
  const vf shift = splat(0x1.8p23f);  // rounds to an integer and leaves it in the low bits
  const vf shifted = x * splat(1.44269504f) + shift;
  const vf n = shifted - shift;
  const vf r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  const vf e = (r * r) * polynomial(r, kTail) + r + splat(1.0f);
  const vf power = as_float(((as_bits(shifted) - as_bits(shift)) + 127u) << 23);
  return select(x < splat(-87.3f), vf{}, e * power);
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
