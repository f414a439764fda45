// Types that the kernels of every instruction set and the code around them share.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "isa.h"

namespace peftkern {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// Two neighbours along the summed dimension, as VDPBF16PS multiplies them.
struct Bf16Pair {
  Bf16 first, second;
};

constexpr Bf16 kBf16One{0x3f80};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
// f16: the exponent is moved to f32's place and rebiased by one exact multiplication, subnormals included.
inline float to_float(F16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float scaled = from_bits(magnitude | sign) * 0x1p112f;
  if ((x.bits & 0x7c00u) != 0x7c00u) return scaled;
  return from_bits(magnitude | sign | 0x7f800000u);
}

enum class Dtype : int { f32, bf16, f16 };

// A matrix in memory; strides in elements.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t row = 0;  // stride between rows
  int64_t col = 1;  // stride between columns
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  Matrix transposed() const { return {data, dtype, col, row}; }
};

// Calls f with a null pointer of the element type.
template <class F>
void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) f(static_cast<float*>(nullptr));
  if (dtype == Dtype::bf16) f(static_cast<Bf16*>(nullptr));
  if (dtype == Dtype::f16) f(static_cast<F16*>(nullptr));
}

// Seeded dropout, the generator of peftkern/ops/dropout.py.
struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint16_t threshold = 0;
  float inverse_keep = 1.0f;
};

constexpr uint32_t kOdd = 0x9E3779B1u;  // what the word of an odd column is times that of the even one before it

// A row's words of the generator in halves of 16 bits: a, and the upper half of b (the lower is 0) and of b times kOdd.
struct RowKey {
  uint16_t a_low, a_high, b_even, b_odd;
};

inline RowKey row_key(uint64_t seed, int64_t row) {
  uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  const auto b = static_cast<uint16_t>(z >> 48);
  return {static_cast<uint16_t>(z), static_cast<uint16_t>(z >> 16), b, static_cast<uint16_t>(b * kOdd)};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised scratch on cache-line boundaries. (An aligned operator new leaves splinters, which take longer to
// collect than the memory does to get.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    if (n == 0) return;
    memory_ = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(n) * sizeof(T) + kLine);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
  }
  T* get() const { return data_; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<std::byte[]> memory_;
  T* data_ = nullptr;
};

// Runs f(begin, end) over parts of [0, tasks) on torch's own threads; below `kSerialWork` multiply-adds in all, or
// alone, f(0, tasks) inline. Every thread has a share of neighbouring tasks, of which it takes half of what is left at
// a time, and then helps the others: cores are not equally fast, and the last one sets the time.
constexpr int64_t kSerialWork = 1 << 17;
template <class F>
void for_tasks(int64_t tasks, int64_t work_per_task, const F& f) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t grain = kSerialWork / (work_per_task > 0 ? work_per_task : 1) + 1, most = ceil_div(tasks, grain);
  const int64_t threads = most > 1 ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  const int64_t count = threads < most ? threads : most;
  if (count <= 1) return tasks > 0 ? f(int64_t{0}, tasks) : void();
  const auto shares = std::make_unique<Share[]>(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) shares[i].next = tasks * i / count, shares[i].end = tasks * (i + 1) / count;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t /*end*/) {
    for (int64_t i = 0; i < count; ++i) {
      Share& share = shares[(begin + i) % count];
      int64_t from = share.next.load(std::memory_order_relaxed);
      while (from < share.end) {
        const int64_t to = from + ceil_div(share.end - from, 2);
        if (!share.next.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
        f(from, to);
        from = share.next.load(std::memory_order_relaxed);
      }
    }
  });
}

// first(i) for i < n_first and second(i) for i < n_second, evenly mixed, so that every share has as much of both.
template <class F, class G>
void for_tasks_of_two(int64_t n_first, int64_t n_second, int64_t work_per_task, const F& first, const G& second) {
  const int64_t tasks = n_first + n_second;
  for_tasks(tasks, work_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t * n_first / tasks;  // of the first kind come before t
      (t + 1) * n_first / tasks > i ? first(i) : second(t - i);
    }
  });
}

}  // namespace peftkern
