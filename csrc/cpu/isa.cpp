#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace peftkern {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
constexpr int kNone = -1;
#if defined(PEFTKERN_EMULATE_AVX512)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif
std::atomic<int> g_forced{kNone};

Isa detect() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  if (!(f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::baseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return kEmulated ? Isa::avx512_bf16 : Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() {
  const int forced = g_forced.load(std::memory_order_relaxed);
  return forced == kNone ? best_isa() : static_cast<Isa>(forced);
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    g_forced.store(kNone, std::memory_order_relaxed);
    return;
  }
  for (int level = 0; level < 4; ++level) {
    if (name != kNames[level]) continue;
    if (level > static_cast<int>(best_isa()))
      throw std::invalid_argument("force_isa: this CPU or build lacks '" + name + "'; the best it has is '" +
                                  isa_name(best_isa()) + "'");
    g_forced.store(level, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("force_isa: unknown instruction set '" + name +
                              "'; known are baseline, avx2, avx512, avx512_bf16");
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::string built_isas() {
#if defined(__x86_64__)
  return "baseline,avx2,avx512,avx512_bf16";
#else
  return "baseline";
#endif
}

}  // namespace peftkern
