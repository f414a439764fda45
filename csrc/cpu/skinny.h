// Products of a wide matrix [M, C] with a small one of R rows, R << C. Read once per instruction set.
//
//   shrink  out[M, R] = a * drop(wide[M, C]) small[R, C]^T     vectors run along C, which is summed
//   expand  out[M, C] = base + drop(a * small[M, R] w[R, C] + bias)
//   outer   out[R, C] = a * small[M, R]^T drop(wide[M, C])     vectors run along C, M is summed in blocks of kRowChunk
//
// The wide matrix is read in its own dtype and converted in registers; sums are f32. `Lane` is what one 32-bit lane
// multiplies: an f32, or a Bf16Pair where everything that is multiplied may be bf16.
// No result depends on how the work is split: a row (shrink, expand) or a column (outer) is always summed in the same
// order.

namespace peftkern::PEFTKERN_ISA {
namespace {

// Accumulators held in registers: 24 of 32 with AVX-512, 12 of 16 below, but 8 in shrink where it converts or masks:
// with its rows, its mask and a row of `small` beside 12, one goes to the stack and back at every step.
constexpr int kDotRows = PEFTKERN_LEVEL >= 2 ? 3 : 2;
constexpr int kStagedDotRows = 3;
constexpr int kDotCols = PEFTKERN_LEVEL >= 2 ? 8 : 4;
constexpr int kTileRows = PEFTKERN_LEVEL >= 2 ? 8 : 4;
constexpr int kTileVecs = 3;
constexpr int kPanel = kTileVecs * kLanes;  // columns of an expand or outer tile
constexpr int64_t kRowChunk = 64;           // rows of a row-parallel task, and those that outer stages at a time
template <class T>
constexpr int64_t kColBlock = 192 / sizeof(T);  // columns of a column-parallel task: whole cache lines and panels
constexpr int64_t kDotBytes = 2048;             // of a row of `small` kept in L1 at a time by shrink
constexpr int kStill = 8;                       // up to this depth w stays in registers and rows stream past it
constexpr int64_t kL2Share = 384 << 10;         // bytes of a packed matrix that stay in L2 beside what streams through
// Rows of `small` above which the wide matrix is staged first, in shrink and, for f32 that is not masked, in outer:
// every few of them read it again, and rows that are a power of two apart share few sets of the cache. In shrink not
// with AVX-512, where to convert and to mask is an instruction each.
constexpr int64_t kUnstagedDots = PEFTKERN_LEVEL >= 2 ? INT64_MAX : 4 * kDotCols;
constexpr int64_t kUnstagedOuter = 32;
static_assert(kColBlock<float> % kPanel == 0 && kColBlock<Bf16> % kPanel == 0);

constexpr int64_t kMaskSlack = 16;  // bytes behind the last row that a whole tile may read
constexpr int64_t mask_stride(int64_t cols) { return ceil_div(cols, 32) * 4; }

// f(first row, rows) for the chunks of kRowChunk rows with the numbers [begin, end), one after the other; of `rows`
// rows in all, the last chunk may be shorter.
template <class F>
PEFTKERN_INLINE void for_chunks(int64_t rows, int64_t begin, int64_t end, const F& f) {
  for (int64_t m = begin * kRowChunk; m < rows && m < end * kRowChunk; m += kRowChunk)
    f(m, rows - m < kRowChunk ? rows - m : kRowChunk);
}
template <class F>
PEFTKERN_INLINE void for_chunks(int64_t rows, const F& f) {
  for_chunks(rows, 0, ceil_div(rows, kRowChunk), f);
}

// Keep bits of rows x [c0, c0 + cols), in whole words of 32, by the generator of peftkern/ops/dropout.py; c0 is even.
// The upper half of a * c + b comes from halves: products of 16 bits are cheaper than those of 32.
[[maybe_unused]] void keep_bits(const RowKey* keys, int64_t rows, int64_t c0, int64_t cols, uint16_t threshold,
                                uint8_t* bits, int64_t ldb) {
  constexpr int kVecs = 16 / kLanes;
  const halves limit = threshold - halves{};
  for (int64_t c = 0; c < cols; c += 32) {
    halves low[kVecs], high[kVecs];  // of the columns' keys
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      vu even = (splat(static_cast<uint32_t>(c0 + c + j * 2 * kLanes + 1)) + 2 * iota()) * 0x21F0AAADu;
      even = (even ^ (even >> 15)) * 0xD35A2D97u;
      const vu odd = even * kOdd;
      low[j] = reinterpret_cast<halves>((even & 0xffffu) | (odd << 16));
      high[j] = reinterpret_cast<halves>((even >> 16) | (odd & 0xffff0000u));
    }
    for (int64_t m = 0; m < rows; ++m) {
      const RowKey key = keys[m];
      const halves a_low = key.a_low - halves{}, a_high = key.a_high - halves{};
      const halves b = reinterpret_cast<halves>(splat(key.b_even | static_cast<uint32_t>(key.b_odd) << 16));
      uint32_t kept = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const halves x = a_low * high[j] + a_high * low[j] + multiply_high(a_low, low[j]) + b;
        kept |= at_least(x, limit) << (j * 2 * kLanes);
      }
      __builtin_memcpy(bits + m * ldb + c / 8, &kept, sizeof kept);
    }
  }
}

// f(lane, wide type): pairs of bf16 only where both matrices are bf16, so that an f32 adapter keeps f32 products.
template <class F>
void with_lane(Dtype wide, Dtype small, const F& f) {
  if constexpr (kHasPairs) {
    if (wide == Dtype::bf16 && small == Dtype::bf16) return f(Bf16Pair{}, static_cast<Bf16*>(nullptr));
  }
  with_dtype(wide, [&](auto* p) { f(0.0f, p); });
}

PEFTKERN_INLINE void assign(Bf16& to, Bf16 from) { to = from; }
template <class P>
PEFTKERN_INLINE void assign(float& to, P from) {
  to = to_float(from);
}
// width elements to lanes: n from memory, `stride` apart, and zeros. Constants where it matters: packing a matrix of
// few rows would otherwise take a tenth of the time of multiplying by it.
template <class P, class Element>
PEFTKERN_INLINE void pack_line(const P* from, int64_t stride, int64_t n, int64_t width, Element* to) {
  auto copy = [&](int64_t step, int64_t count) {
    for (int64_t i = 0; i < count; ++i) assign(to[i], from[i * step]);
  };
  if (n == width)
    stride == 1 ? copy(1, width) : copy(stride, width);
  else
    copy(stride, n);
  for (int64_t i = n; i < width; ++i) to[i] = Element{};
}

// The wide operand of a tile, row after row: packed lanes, or a row of the matrix itself.
template <class Lane>
struct Packed {
  const Lane* row;
  int64_t stride;
  PEFTKERN_INLINE vf at(int v) const { return load_lanes(row + v * kLanes); }
  PEFTKERN_INLINE void next() { row += stride; }
};
template <class T, bool MASKED>
struct Direct {
  static constexpr int64_t kAhead = 16;  // rows; a column of tiles is too short for the hardware to prefetch
  const T* row;
  int64_t stride;
  const uint8_t* bits;
  int64_t ldb, c;
  PEFTKERN_INLINE vf at(int v) const {
    const vf value = load(row + v * kLanes);
    if constexpr (MASKED) return keep(value, lane_bits(bits, c + v * kLanes));
    return value;
  }
  PEFTKERN_INLINE void next() {
    __builtin_prefetch(row + kAhead * stride, 0, 3);
    __builtin_prefetch(row + kAhead * stride + kPanel - kLanes, 0, 3);
    row += stride;
    if constexpr (MASKED) bits += ldb;
  }
};

// acc[i][v] += sum over t < depth of small[i][t * st] * wide row t, vector v; depth >= 1
template <class Lane, int ROWS, class Wide>
PEFTKERN_INLINE void tile(const Lane* const (&small)[ROWS], int64_t st, Wide wide, int64_t depth,
                          vf (&acc)[ROWS][kTileVecs]) {
  int64_t offset = 0;
  do {
    vf w[kTileVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) w[v] = wide.at(v);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const vf s = splat_lane(small[i] + offset);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) acc[i][v] = mac<Lane>(acc[i][v], s, w[v]);
    }
    offset += st;
    wide.next();
  } while (--depth > 0);
}

// Columns from c on, of which those from `cols` on are not there.
template <class T>
PEFTKERN_INLINE vf load_columns(const T* p, int64_t c, int64_t cols) {
  if (c + kLanes <= cols) return load(p + c);
  return c < cols ? load_part(p + c, cols - c) : vf{};
}
template <class T>
PEFTKERN_INLINE void store_columns(T* p, vf v, int64_t c, int64_t cols) {
  if (c + kLanes <= cols)
    store(p + c, v);
  else if (c < cols)
    store_part(p + c, v, cols - c);
}

// drop(x)[c0 : c1] to f32, in whole vectors; dropped elements and those from `cols` on are zero.
template <bool MASKED, class T>
PEFTKERN_INLINE void stage_line(const T* x, int64_t c0, int64_t c1, int64_t cols, const uint8_t* bits, float* to) {
  for (int64_t c = c0; c < c1; c += kLanes, to += kLanes) {
    vf value = load_columns(x, c, cols);
    if constexpr (MASKED) value = keep(value, lane_bits(bits, c));
    store(to, value);
  }
}

// to[j] = f(to[j], from[j]) for j < n.
template <class F>
PEFTKERN_INLINE void combine_line(const float* from, int64_t n, float* to, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, f(load(to + j), load(from + j)));
  if (j < n) store_part(to + j, f(load_part(to + j, n - j), load_part(from + j, n - j)), n - j);
}
[[maybe_unused]] PEFTKERN_INLINE void add_line(const float* from, int64_t n, float* to) {
  combine_line(from, n, to, [](vf a, vf b) { return a + b; });
}
[[maybe_unused]] PEFTKERN_INLINE void multiply_line(const float* from, int64_t n, float* to) {
  combine_line(from, n, to, [](vf a, vf b) { return a * b; });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA

#include "shrink.h"
#include "expand.h"
#include "outer.h"
