// Includes PEFTKERN_ISA_FILE once per instruction set, each time with
//   PEFTKERN_ISA    the namespace that its kernels go into
//   PEFTKERN_LEVEL  0 baseline, 1 AVX2+FMA+F16C, 2 AVX-512, 3 AVX-512-BF16
// and with that instruction set switched on for the functions defined in it, so that no source file needs flags of
// its own. System headers must be included before this one, or their inline functions would be compiled for the
// wrong CPU. The technique is Highway's foreach_target (github.com/google/highway).

#define PEFTKERN_ISA baseline
#define PEFTKERN_LEVEL 0
#include PEFTKERN_ISA_FILE
#undef PEFTKERN_ISA
#undef PEFTKERN_LEVEL

#if defined(__x86_64__)

#define PEFTKERN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define PEFTKERN_PUSH(features) \
  PEFTKERN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PEFTKERN_POP PEFTKERN_PRAGMA(clang attribute pop)
#else
#define PEFTKERN_PUSH(features) PEFTKERN_PRAGMA(GCC push_options) PEFTKERN_PRAGMA(GCC target(features))
#define PEFTKERN_POP PEFTKERN_PRAGMA(GCC pop_options)
#endif

PEFTKERN_PUSH("avx2,fma,f16c")
#define PEFTKERN_ISA avx2
#define PEFTKERN_LEVEL 1
#include PEFTKERN_ISA_FILE
#undef PEFTKERN_ISA
#undef PEFTKERN_LEVEL
PEFTKERN_POP

#if defined(PEFTKERN_EMULATE_AVX512)  // tests/csrc/emulate_avx512.h
#define PEFTKERN_AVX512 "avx2,fma,f16c"
#define PEFTKERN_AVX512_BF16 PEFTKERN_AVX512
#else
#define PEFTKERN_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define PEFTKERN_AVX512_BF16 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#endif

PEFTKERN_PUSH(PEFTKERN_AVX512)
#define PEFTKERN_ISA avx512
#define PEFTKERN_LEVEL 2
#include PEFTKERN_ISA_FILE
#undef PEFTKERN_ISA
#undef PEFTKERN_LEVEL
PEFTKERN_POP

PEFTKERN_PUSH(PEFTKERN_AVX512_BF16)
#define PEFTKERN_ISA avx512_bf16
#define PEFTKERN_LEVEL 3
#include PEFTKERN_ISA_FILE
#undef PEFTKERN_ISA
#undef PEFTKERN_LEVEL
PEFTKERN_POP

// Calls FUNCTION of the namespace that belongs to the active instruction set.
#define PEFTKERN_CALL(FUNCTION, ...)                  \
  switch (::peftkern::active_isa()) {                 \
    case ::peftkern::Isa::avx512_bf16:                \
      ::peftkern::avx512_bf16::FUNCTION(__VA_ARGS__); \
      break;                                          \
    case ::peftkern::Isa::avx512:                     \
      ::peftkern::avx512::FUNCTION(__VA_ARGS__);      \
      break;                                          \
    case ::peftkern::Isa::avx2:                       \
      ::peftkern::avx2::FUNCTION(__VA_ARGS__);        \
      break;                                          \
    default:                                          \
      ::peftkern::baseline::FUNCTION(__VA_ARGS__);    \
  }

#else

#define PEFTKERN_CALL(FUNCTION, ...) ::peftkern::baseline::FUNCTION(__VA_ARGS__)

#endif
