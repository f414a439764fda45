// Stands in for the AVX-512 and AVX-512-BF16 intrinsics that csrc/cpu uses, in AVX2, so that the code of every
// instruction set can be tested on a CPU that lacks them. Slow, and for tests only: the compiler reads it before each
// source (-include) and PEFTKERN_EMULATE_AVX512 is set. What each one computes: Intel's Intrinsics Guide.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

template <class To, class From>
EMULATED To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The elements of a mask; memory behind a cleared bit is not touched.
template <class Vec, class T>
EMULATED Vec load_masked(uint32_t mask, const void* p) {
  constexpr int kCount = sizeof(Vec) / sizeof(T);
  T lanes[kCount] = {};
  for (int i = 0; i < kCount; ++i)
    if (mask >> i & 1u) std::memcpy(&lanes[i], static_cast<const T*>(p) + i, sizeof(T));
  return as<Vec>(lanes);
}
template <class T, class Vec>
EMULATED void store_masked(void* p, uint32_t mask, const Vec& v) {
  constexpr int kCount = sizeof(Vec) / sizeof(T);
  T lanes[kCount];
  std::memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < kCount; ++i)
    if (mask >> i & 1u) std::memcpy(static_cast<T*>(p) + i, &lanes[i], sizeof(T));
}
EMULATED float from_bf16(uint16_t half) { return as<float>(static_cast<uint32_t>(half) << 16); }

EMULATED __m512i load_si512(const void* p) {
  __m512i v;
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // as the instruction faults
  std::memcpy(&v, p, sizeof v);
  return v;
}
EMULATED void storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
EMULATED __m512i set1_epi16(int x) { return as<__m512i>(u16x32{} + static_cast<uint16_t>(x)); }
EMULATED __m512i add_epi16(__m512i a, __m512i b) { return as<__m512i>(as<u16x32>(a) + as<u16x32>(b)); }
EMULATED __m512i cvtepu16_epi32(__m256i v) { return as<__m512i>(__builtin_convertvector(as<u16x16>(v), u32x16)); }
EMULATED __m256i cvtepi32_epi16(__m512i v) { return as<__m256i>(__builtin_convertvector(as<u32x16>(v), u16x16)); }
EMULATED __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  const u16x32 x = as<u16x32>(a), y = as<u16x32>(b), at = as<u16x32>(index);
  u16x32 out;
  for (int i = 0; i < 32; ++i) out[i] = at[i] & 32 ? y[at[i] & 31] : x[at[i] & 31];
  return as<__m512i>(out);
}
EMULATED __mmask32 cmpge_epu16_mask(__m512i a, __m512i b) {
  const u16x32 x = as<u16x32>(a), y = as<u16x32>(b);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(x[i] >= y[i]) << i;
  return bits;
}
EMULATED __m512i mulhi_epu16(__m512i a, __m512i b) {
  const u16x32 y = as<u16x32>(b);
  u16x32 x = as<u16x32>(a);
  for (int i = 0; i < 32; ++i) x[i] = static_cast<uint16_t>(uint32_t{x[i]} * y[i] >> 16);
  return as<__m512i>(x);
}
EMULATED __m512 maskz_mov_ps(__mmask16 mask, __m512 v) { return load_masked<__m512, uint32_t>(mask, &v); }
EMULATED __m512i maskz_mov_epi16(__mmask32 mask, __m512i v) { return load_masked<__m512i, uint16_t>(mask, &v); }
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const __m256 *x = reinterpret_cast<__m256*>(&a), *y = reinterpret_cast<__m256*>(&b),
               *z = reinterpret_cast<__m256*>(&c);
  const __m256 out[2] = {_mm256_fmadd_ps(x[0], y[0], z[0]), _mm256_fmadd_ps(x[1], y[1], z[1])};
  return as<__m512>(out);
}
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const u16x32 x = as<u16x32>(a), y = as<u16x32>(b);
  f32x16 out = as<f32x16>(sum);
  for (int i = 0; i < 16; ++i) {
    out[i] += from_bf16(x[2 * i + 1]) * from_bf16(y[2 * i + 1]);
    out[i] += from_bf16(x[2 * i]) * from_bf16(y[2 * i]);
  }
  return as<__m512>(out);
}
EMULATED __m512 cvtph_ps(__m256i v) {
  const __m128i* half = reinterpret_cast<__m128i*>(&v);
  const __m256 out[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return as<__m512>(out);
}
EMULATED __m256i cvtps_ph(__m512 v) {
  const __m256* part = reinterpret_cast<__m256*>(&v);
  const __m128i out[2] = {_mm256_cvtps_ph(part[0], 0), _mm256_cvtps_ph(part[1], 0)};
  return as<__m256i>(out);
}
EMULATED __m256bh cvtneps_pbh(__m512 v) {
  const f32x16 x = as<f32x16>(v);
  u16x16 out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = as<uint32_t>(static_cast<float>(x[i]));
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool is_subnormal = (bits & 0x7f800000u) == 0;
    out[i] = static_cast<uint16_t>(x[i] != x[i] ? bits >> 16 | 0x40u : is_subnormal ? bits >> 16 & 0x8000u : rounded);
  }
  return as<__m256bh>(out);
}

}  // namespace emulated

#pragma GCC pop_options

#define _mm512_load_si512 emulated::load_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_permutex2var_epi16 emulated::permutex2var_epi16
#define _mm512_cmpge_epu16_mask emulated::cmpge_epu16_mask
#define _mm512_mulhi_epu16 emulated::mulhi_epu16
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_maskz_mov_epi16 emulated::maskz_mov_epi16
#define _mm512_maskz_loadu_ps emulated::load_masked<__m512, uint32_t>
#define _mm512_maskz_loadu_epi16 emulated::load_masked<__m512i, uint16_t>
#define _mm256_maskz_loadu_epi16 emulated::load_masked<__m256i, uint16_t>
#define _mm512_mask_storeu_ps emulated::store_masked<uint32_t>
#define _mm256_mask_storeu_epi16 emulated::store_masked<uint16_t>
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
