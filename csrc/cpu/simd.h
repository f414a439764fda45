// Vectors of f32 lanes for the instruction set that foreach_isa.h has switched on. No include guard: this is read
// once per instruction set. GCC and Clang vector extensions do the arithmetic; intrinsics only what those cannot say.

namespace peftkern::PEFTKERN_ISA {
namespace {

#define PEFTKERN_INLINE inline __attribute__((always_inline))

#if PEFTKERN_LEVEL >= 2
constexpr int kLanes = 16;
#elif PEFTKERN_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr bool kHasPairs = PEFTKERN_LEVEL >= 3;

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

// What the kernels multiply, 32 bits a lane: one f32, or two bf16 that meet two bf16 (Bf16Pair is the wire format).
template <class Lane>
constexpr int kPerLane = 1;
template <>
constexpr int kPerLane<Bf16Pair> = 2;

PEFTKERN_INLINE vf splat(float x) { return x - vf{}; }
PEFTKERN_INLINE vu splat(uint32_t x) { return x - vu{}; }
PEFTKERN_INLINE vf as_float(vu x) { return reinterpret_cast<vf>(x); }
PEFTKERN_INLINE vu as_bits(vf x) { return reinterpret_cast<vu>(x); }
PEFTKERN_INLINE vf select(vi mask, vf yes, vf no) {
  return as_float((as_bits(yes) & reinterpret_cast<vu>(mask)) | (as_bits(no) & ~reinterpret_cast<vu>(mask)));
}
PEFTKERN_INLINE vu iota() {
  vu v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<uint32_t>(i);
  return v;
}

template <class Vec>
PEFTKERN_INLINE Vec load_as(const void* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// ---- lanes of 16 bits to lanes of 32 and back, values below 2^16. GCC 12 takes __builtin_convertvector apart: five
// instructions for the one.

PEFTKERN_INLINE vu widen(vh v) {
#if PEFTKERN_LEVEL >= 2
  return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif PEFTKERN_LEVEL == 1
  return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, vu);
#endif
}
PEFTKERN_INLINE vh narrow(vu v) {
#if PEFTKERN_LEVEL >= 2
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif PEFTKERN_LEVEL == 1
  const __m256i wide = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<vh>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(v, vh);
#endif
}

// ---- kLanes elements from memory to f32

PEFTKERN_INLINE vf load(const float* p) { return load_as<vf>(p); }
PEFTKERN_INLINE vf load(const Bf16* p) { return as_float(widen(load_as<vh>(p)) << 16); }
PEFTKERN_INLINE vf load(const F16* p) {
#if PEFTKERN_LEVEL >= 2
  return reinterpret_cast<vf>(_mm512_cvtph_ps(load_as<__m256i>(p)));
#elif PEFTKERN_LEVEL == 1
  return reinterpret_cast<vf>(_mm256_cvtph_ps(load_as<__m128i>(p)));
#else
  // The exponent is moved to f32's place and rebiased by one exact multiplication, which also handles subnormals.
  const vu h = widen(load_as<vh>(p));
  const vu magnitude = (h & 0x7fffu) << 13;
  const vu scaled = as_bits(as_float(magnitude) * splat(0x1p112f));
  const vi special = (h & 0x7c00u) == splat(0x7c00u);
  const vu finite_or_not = scaled | (reinterpret_cast<vu>(special) & 0x7f800000u);
  return as_float(finite_or_not | (h & 0x8000u) << 16);
#endif
}

// ---- f32 to kLanes elements in memory, rounded to nearest even

PEFTKERN_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
PEFTKERN_INLINE vh to_bf16(vf v) {
#if PEFTKERN_LEVEL >= 3
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const vu bits = as_bits(v);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu is_nan = reinterpret_cast<vu>(v != v);
  return narrow((rounded & ~is_nan) | (splat(0x7fc0u) & is_nan));
#endif
}
PEFTKERN_INLINE void store(Bf16* p, vf v) {
  const vh h = to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
PEFTKERN_INLINE void store(F16* p, vf v) {
#if PEFTKERN_LEVEL >= 2
  const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PEFTKERN_LEVEL == 1
  const __m128i h = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu bits = as_bits(v);
  const vu sign = (bits >> 16) & 0x8000u;
  const vu magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round to nearest even in integers; a carry into the exponent is the right answer.
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 leaves the value, rounded by the FPU, in the low bits.
  const vu subnormal = as_bits(as_float(magnitude) + splat(0.5f)) - as_bits(splat(0.5f));
  const vu is_small = reinterpret_cast<vu>(magnitude < splat(113u << 23));
  const vu is_large = reinterpret_cast<vu>(magnitude >= splat(0x477ff000u));
  const vu is_nan = reinterpret_cast<vu>(v != v);
  vu out = (subnormal & is_small) | (normal & ~is_small);
  out = (splat(0x7c00u) & is_large) | (out & ~is_large);
  out = (splat(0x7e00u) & is_nan) | (out & ~is_nan);
  const vh h = narrow(out | sign);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

// ---- the ragged end of a row: 0 < n < kLanes elements, zeros behind them

#if PEFTKERN_LEVEL >= 2
PEFTKERN_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
PEFTKERN_INLINE vf load_part(const float* p, int64_t n) {
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
PEFTKERN_INLINE vf load_part(const Bf16* p, int64_t n) {
  const vh h = reinterpret_cast<vh>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return as_float(widen(h) << 16);
}
PEFTKERN_INLINE vf load_part(const F16* p, int64_t n) {
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
PEFTKERN_INLINE void store_part(float* p, vf v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), reinterpret_cast<__m512>(v));
}
template <class T>
PEFTKERN_INLINE void store_part(T* p, vf v, int64_t n) {
  __m256i h;
  store(reinterpret_cast<T*>(&h), v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), h);
}
#else
template <class T>
PEFTKERN_INLINE vf load_part(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
PEFTKERN_INLINE void store_part(T* p, vf v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

// ---- dropout masks, one bit an element, lowest bit first

// The keep bits of the lane-aligned column c, lowest first; there may be others above them.
PEFTKERN_INLINE uint32_t lane_bits(const uint8_t* bits, int64_t c) {
#if PEFTKERN_LEVEL >= 2
  uint16_t b;
  __builtin_memcpy(&b, bits + c / 8, sizeof b);
  return b;
#elif PEFTKERN_LEVEL == 1
  uint32_t b;  // a whole word, which one load brings to all lanes
  __builtin_memcpy(&b, bits + c / 8, sizeof b);
  return b;
#else
  return static_cast<uint32_t>(bits[c / 8] >> (c % 8));
#endif
}
// v where the bit is set, else 0 (also where v is not finite, as a select and not as a product).
PEFTKERN_INLINE vf keep(vf v, uint32_t bits) {
#if PEFTKERN_LEVEL >= 2
  return reinterpret_cast<vf>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#else
  const vu lane = splat(1u) << iota();
  return as_float(as_bits(v) & reinterpret_cast<vu>((splat(bits) & lane) == lane));
#endif
}
typedef uint16_t halves __attribute__((vector_size(4 * kLanes)));
// The upper halves of the products.
PEFTKERN_INLINE halves multiply_high(halves a, halves b) {
#if PEFTKERN_LEVEL >= 2
  return reinterpret_cast<halves>(_mm512_mulhi_epu16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif PEFTKERN_LEVEL == 1
  return reinterpret_cast<halves>(_mm256_mulhi_epu16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<halves>(_mm_mulhi_epu16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  for (int i = 0; i < 2 * kLanes; ++i) a[i] = static_cast<uint16_t>(uint32_t{a[i]} * b[i] >> 16);
  return a;
#endif
}
// The bits of those that are at least the threshold.
PEFTKERN_INLINE uint32_t at_least(halves x, halves threshold) {
#if PEFTKERN_LEVEL >= 2
  return _mm512_cmpge_epu16_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(threshold));
#else
  const auto mask = x >= threshold;
#if PEFTKERN_LEVEL == 1
  const __m256i wide = reinterpret_cast<__m256i>(mask);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(reinterpret_cast<__m128i>(mask), __m128i{})));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 2 * kLanes; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
#endif
}

// ---- multiply and accumulate in f32

PEFTKERN_INLINE vf splat_lane(const float* p) { return splat(*p); }
PEFTKERN_INLINE vf splat_lane(const Bf16Pair* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return as_float(splat(bits));
}
PEFTKERN_INLINE vf load_lanes(const float* p) { return load_as<vf>(p); }
PEFTKERN_INLINE vf load_lanes(const Bf16Pair* p) { return load_as<vf>(p); }

template <class Lane>
PEFTKERN_INLINE vf mac(vf acc, vf a, vf b) {
#if PEFTKERN_LEVEL >= 3
  if constexpr (kPerLane<Lane> == 2)
    return reinterpret_cast<vf>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  else
    return reinterpret_cast<vf>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(acc)));
#else
  return acc + a * b;
#endif
}

// Keeps a value in a register: without it GCC turns one load and three uses into three loads, and the load ports, not
// the multipliers, set the pace.
PEFTKERN_INLINE vf in_register(vf v) {
#if defined(PEFTKERN_EMULATE_AVX512)
  // Not every vector fits a register.
#elif PEFTKERN_LEVEL >= 2
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// The sums over the lanes of four vectors, in one 4-lane vector.
typedef float v4 __attribute__((vector_size(16)));
PEFTKERN_INLINE v4 sum4(vf a, vf b, vf c, vf d) {
#if PEFTKERN_LEVEL >= 2
  const vf ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const vf cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const vf s = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const v4 low = __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
  return low + (__builtin_shufflevector(s, s, 8, 9, 10, 11) + __builtin_shufflevector(s, s, 12, 13, 14, 15));
#elif PEFTKERN_LEVEL == 1
  const vf ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const vf cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  const vf s = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
  const vf ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const vf cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
