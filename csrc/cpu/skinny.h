// Products of a wide matrix [M, C] with a small one of R rows, R << C. Read once per instruction set.
//
//   shrink  out[M, R] = a * drop(wide[M, C]) small[R, C]^T     vectors run along C, which is summed
//   expand  out[M, C] = base + drop(a * (small[M, R] w[R, C] + bias))
//   outer   out[R, C] = a * small[M, R]^T drop(wide[M, C])     vectors run along C, M is summed in blocks of kOuterRows
//
// The wide matrix is read in its own dtype and converted in registers; sums are f32. `Lane` is what one 32-bit lane
// multiplies: an f32, or a Bf16Pair where everything that is multiplied may be bf16.
// No result depends on how the work is split: a row (shrink, expand) or a column (outer) is always summed in the same
// order.

namespace peftkern::PEFTKERN_ISA {
namespace {

// Accumulators held in registers: 24 of 32 with AVX-512, 12 of 16 below.
constexpr int kDotRows = 3;
constexpr int kDotCols = PEFTKERN_LEVEL >= 2 ? 8 : 4;
constexpr int kTileRows = PEFTKERN_LEVEL >= 2 ? 8 : 4;
constexpr int kTileVecs = 3;
constexpr int kPanel = kTileVecs * kLanes;  // columns of an expand or outer tile
constexpr int64_t kRowChunk = 48;           // rows of a row-parallel task
constexpr int64_t kColBlock = 48;           // columns of a column-parallel task, a multiple of kPanel
constexpr int64_t kOuterRows = 64;          // rows staged at a time by outer
constexpr int64_t kDotBytes = 2048;         // of a row of `small` kept in L1 at a time by shrink
static_assert(kColBlock % kPanel == 0);

constexpr int64_t kMaskSlack = 16;  // bytes behind the last row that a whole tile may read
constexpr int64_t mask_stride(int64_t cols) { return ceil_div(cols, 32) * 4; }

// Keep bits of rows x [c0, c0 + cols), c0 % 16 == 0. Hash of a column, per row: see DESIGN of ops/dropout.py.
void keep_bits(const RowKey* keys, int64_t rows, int64_t c0, int64_t cols, uint32_t threshold, uint8_t* bits,
               int64_t ldb) {
  const vu limit = splat(threshold);
  const int64_t words = ceil_div(cols, 16);
  for (int64_t w = 0; w < words; ++w) {
    vu column[16 / kLanes];
    for (int j = 0; j < 16 / kLanes; ++j) {
      const vu c = splat(static_cast<uint32_t>(c0 + w * 16 + j * kLanes)) + iota();
      column[j] = c ^ (c >> 16);
    }
    for (int64_t m = 0; m < rows; ++m) {
      uint32_t word = 0;
      for (int j = 0; j < 16 / kLanes; ++j) {
        vu x = (column[j] ^ splat(keys[m].first)) * splat(0x21F0AAADu);
        x = x ^ (x >> 15) ^ splat(keys[m].second);
        x *= splat(0xD35A2D97u);
        x ^= x >> 15;
        word |= bits_at_least(x, limit) << (j * kLanes);
      }
      const uint16_t word16 = static_cast<uint16_t>(word);
      __builtin_memcpy(bits + m * ldb + w * 2, &word16, sizeof word16);
    }
  }
}

template <class Lane>
PEFTKERN_INLINE void store_lanes(Lane* p, vf lanes, int64_t n) {
  __builtin_memcpy(p, &lanes, static_cast<size_t>(n < kLanes ? n : kLanes) * sizeof(Lane));
}

// ---- packing of the small matrix, once per call

// small[R, C] for shrink: blocks of kDotCols rows; in a block, for every vector of C, that vector of each row.
// Zeros fill up the last block's rows to a multiple of 4 and the last vector.
template <class Lane>
struct DotPack {
  static constexpr int64_t kStep = kLanes * kPerLane<Lane>;  // elements of C in a vector
  int64_t rows, steps;
  Buffer<Lane> data;
  DotPack(int64_t r, int64_t c)
      : rows(r), steps(ceil_div(c, kStep)), data(round_up(r, 4) * steps * kLanes) {}
  static int width(int64_t left) { return left > 4 ? kDotCols : 4; }
  // First lane of the block that starts at row r0, at vector s.
  const Lane* at(int64_t r0, int64_t s) const {
    return data.get() + r0 * steps * kLanes + s * kLanes * width(rows - r0);
  }
};

template <class Lane, class P>
void pack_dot_rows(const DotPack<Lane>& pack, const Matrix& small, int64_t cols, int64_t begin, int64_t end) {
  using Element = std::conditional_t<kPerLane<Lane> == 2, Bf16, float>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t r0 = r / kDotCols * kDotCols;
    const int width = DotPack<Lane>::width(pack.rows - r0);
    const P* row = small.as<const P>() + r * small.row;
    for (int64_t s = 0; s < pack.steps; ++s) {
      Lane* lanes = const_cast<Lane*>(pack.at(r0, s)) + (r - r0) * kLanes;
      Element* to = reinterpret_cast<Element*>(lanes);
      for (int64_t i = 0; i < DotPack<Lane>::kStep; ++i) {
        const int64_t c = s * DotPack<Lane>::kStep + i;
        const bool inside = r < pack.rows && c < cols;
        if constexpr (kPerLane<Lane> == 2)
          to[i] = inside ? row[c * small.col] : Bf16{0};
        else
          to[i] = inside ? to_float(row[c * small.col]) : 0.0f;
      }
    }
  }
}

// w[R, C] for expand: panels of kPanel columns; in a panel row after row (pairs of rows for Bf16Pair). Zero filled.
template <class Lane>
struct PanelPack {
  int64_t depth, panels;  // lanes along R, panels along C
  Buffer<Lane> data;
  PanelPack(int64_t r, int64_t c)
      : depth(ceil_div(r, kPerLane<Lane>)), panels(ceil_div(c, kPanel)), data(depth * panels * kPanel) {}
  Lane* at(int64_t panel) const { return data.get() + panel * depth * kPanel; }
};

template <class Lane, class P>
void pack_panels(const PanelPack<Lane>& pack, const Matrix& w, int64_t rows, int64_t cols, int64_t begin,
                 int64_t end) {
  const P* source = w.as<const P>();
  for (int64_t panel = begin; panel < end; ++panel) {
    Lane* to = pack.at(panel);
    const int64_t c0 = panel * kPanel;
    for (int64_t t = 0; t < pack.depth; ++t) {
      for (int64_t j = 0; j < kPanel; ++j) {
        const P* from = source + (c0 + j) * w.col;
        const bool inside = c0 + j < cols;
        if constexpr (kPerLane<Lane> == 2) {
          to[t * kPanel + j].first = inside ? from[2 * t * w.row] : Bf16{0};
          to[t * kPanel + j].second = inside && 2 * t + 1 < rows ? from[(2 * t + 1) * w.row] : Bf16{0};
        } else {
          to[t * kPanel + j] = inside ? to_float(from[t * w.row]) : 0.0f;
        }
      }
    }
  }
}

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) f(static_cast<float*>(nullptr));
  if (dtype == Dtype::bf16) f(static_cast<Bf16*>(nullptr));
  if (dtype == Dtype::f16) f(static_cast<F16*>(nullptr));
}

// f(lane, wide type): pairs of bf16 only where both matrices are bf16, so that an f32 adapter keeps f32 products.
template <class F>
void with_lane(Dtype wide, Dtype small, const F& f) {
  if constexpr (kHasPairs) {
    if (wide == Dtype::bf16 && small == Dtype::bf16) return f(Bf16Pair{}, static_cast<Bf16*>(nullptr));
  }
  with_dtype(wide, [&](auto* p) { f(0.0f, p); });
}

template <class Lane>
void pack_dot(const DotPack<Lane>& pack, const Matrix& small, int64_t cols) {
  for_tasks(round_up(pack.rows, 4), cols * 4, [&](int64_t begin, int64_t end) {
    if constexpr (kPerLane<Lane> == 2) {
      pack_dot_rows<Lane, Bf16>(pack, small, cols, begin, end);
    } else {
      with_dtype(small.dtype, [&](auto* p) {
        pack_dot_rows<Lane, std::remove_pointer_t<decltype(p)>>(pack, small, cols, begin, end);
      });
    }
  });
}

template <class Lane>
void pack_panel(const PanelPack<Lane>& pack, const Matrix& w, int64_t rows, int64_t cols) {
  for_tasks(pack.panels, rows * kPanel * 4, [&](int64_t begin, int64_t end) {
    if constexpr (kPerLane<Lane> == 2) {
      pack_panels<Lane, Bf16>(pack, w, rows, cols, begin, end);
    } else {
      with_dtype(w.dtype, [&](auto* p) {
        pack_panels<Lane, std::remove_pointer_t<decltype(p)>>(pack, w, rows, cols, begin, end);
      });
    }
  });
}

// ---- shrink

// One vector of a wide row as lanes: converted to f32, or 2 * kLanes bf16 as they are.
template <class Lane, class T>
PEFTKERN_INLINE vf wide_lanes(const T* p) {
  if constexpr (kPerLane<Lane> == 2)
    return load_as<vf>(p);
  else
    return load(p);
}
template <class Lane, class T>
PEFTKERN_INLINE vf wide_lanes_part(const T* p, int64_t n) {
  T buffer[kLanes * kPerLane<Lane>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return wide_lanes<Lane>(buffer);
}
// The same, with dropped elements zeroed; c is the column.
template <class Lane>
PEFTKERN_INLINE vf keep_lanes(vf v, const uint8_t* bits, int64_t c) {
#if PEFTKERN_LEVEL >= 3
  if constexpr (kPerLane<Lane> == 2) {
    uint32_t b;
    __builtin_memcpy(&b, bits + c / 8, sizeof b);
    return reinterpret_cast<vf>(_mm512_maskz_mov_epi16(b, reinterpret_cast<__m512i>(v)));
  }
#endif
  return keep(v, lane_bits(bits, c));
}

// out[ROWS][COLS] (+)= scale * x[ROWS, c0 : c1] . packed rows
template <class Lane, class T, int ROWS, int COLS, bool MASKED>
void dot_tile(const T* x, int64_t ldx, const uint8_t* bits, int64_t ldb, const Lane* packed, int64_t c0, int64_t c1,
              float scale, bool add, float* out, int64_t ldo, int64_t cols) {
  constexpr int64_t kStep = kLanes * kPerLane<Lane>;
  vf acc[ROWS][COLS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) acc[i][j] = vf{};
  int64_t c = c0;
  for (; c + kStep <= c1; c += kStep) {
    vf xs[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      xs[i] = wide_lanes<Lane>(x + i * ldx + c);
      if constexpr (MASKED) xs[i] = keep_lanes<Lane>(xs[i], bits + i * ldb, c);
    }
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      const vf a = load_lanes(packed + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) acc[i][j] = mac<Lane>(acc[i][j], xs[i], a);
    }
    packed += COLS * kLanes;
  }
  if (c < c1) {
    for (int i = 0; i < ROWS; ++i) {
      vf xi = wide_lanes_part<Lane>(x + i * ldx + c, c1 - c);
      if constexpr (MASKED) xi = keep_lanes<Lane>(xi, bits + i * ldb, c);
#pragma GCC unroll 8
      for (int j = 0; j < COLS; ++j) acc[i][j] = mac<Lane>(acc[i][j], xi, load_lanes(packed + j * kLanes));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < COLS; j += 4) {
      const v4 sums = sum4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]) * scale;
      float* to = out + i * ldo + j;
      for (int k = 0; k < 4 && j + k < cols; ++k) to[k] = add ? to[k] + sums[k] : sums[k];
    }
  }
}

template <class Lane, class T, int COLS, bool MASKED>
void dot_rows(const T* x, int64_t ldx, int64_t rows, const uint8_t* bits, int64_t ldb, const Lane* packed, int64_t c0,
              int64_t c1, float scale, bool add, float* out, int64_t ldo, int64_t cols) {
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_tile<Lane, T, kDotRows, COLS, MASKED>(x + m * ldx, ldx, bits + m * ldb, ldb, packed, c0, c1, scale, add,
                                              out + m * ldo, ldo, cols);
  for (; m < rows; ++m)
    dot_tile<Lane, T, 1, COLS, MASKED>(x + m * ldx, ldx, bits + m * ldb, ldb, packed, c0, c1, scale, add,
                                       out + m * ldo, ldo, cols);
}

// out[rows, R] = scale * drop(x[rows, C]) small^T; bits may be null: no dropout.
template <class Lane, class T>
void shrink(const T* x, int64_t ldx, int64_t rows, int64_t cols, const uint8_t* bits, int64_t ldb,
            const DotPack<Lane>& small, float scale, float* out, int64_t ldo) {
  constexpr int64_t kStep = DotPack<Lane>::kStep;
  constexpr int64_t kMost = kDotBytes / (kLanes * 4);  // vectors
  const int64_t blocks = ceil_div(small.steps, kMost), per_block = ceil_div(small.steps, blocks);
  for (int64_t s0 = 0; s0 < small.steps; s0 += per_block) {
    const int64_t c0 = s0 * kStep;
    const int64_t c1 = (s0 + per_block) * kStep < cols ? (s0 + per_block) * kStep : cols;
    for (int64_t r0 = 0; r0 < small.rows; r0 += kDotCols) {
      const int64_t left = small.rows - r0;
      auto run = [&](auto* f) {
        f(x, ldx, rows, bits, ldb, small.at(r0, s0), c0, c1, scale, s0 > 0, out + r0, ldo, left);
      };
      if (DotPack<Lane>::width(left) == kDotCols)
        bits ? run(dot_rows<Lane, T, kDotCols, true>) : run(dot_rows<Lane, T, kDotCols, false>);
      else
        bits ? run(dot_rows<Lane, T, 4, true>) : run(dot_rows<Lane, T, 4, false>);
    }
  }
}

// ---- expand and outer share this tile

// acc[i][v] += sum over t < depth of small[i * si + t * st] * wide[t * sw + v * kLanes ...]
template <class Lane, int ROWS>
PEFTKERN_INLINE void tile(const Lane* const (&small)[ROWS], int64_t st, const Lane* wide, int64_t sw, int64_t depth,
                          vf (&acc)[ROWS][kTileVecs]) {
  for (int64_t t = 0, offset = 0; t < depth; ++t, offset += st, wide += sw) {
    vf w[kTileVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) w[v] = load_lanes(wide + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const vf s = splat_lane(small[i] + offset);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) acc[i][v] = mac<Lane>(acc[i][v], s, w[v]);
    }
  }
}

// Where expand writes: out = base + drop(scale * (product + bias)). base may be out, another matrix or null (zero).
template <class T>
struct ExpandTo {
  T* out;
  int64_t ldo;
  const T* base;
  int64_t ldbase;
  const float* bias;  // [panels * kPanel] or null
  float scale;
  const uint8_t* bits;  // of column `first_col` on, or null
  int64_t ldb;
};

template <class Lane, class T, int ROWS, bool MASKED>
void expand_tile(const Lane* small, int64_t lds, int64_t rows, const PanelPack<Lane>& w, int64_t panel, int64_t cols,
                 int64_t mask_c0, const ExpandTo<T>& to) {
  const int64_t c0 = panel * kPanel;
  vf acc[ROWS][kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    const vf start = to.bias ? load(to.bias + c0 + v * kLanes) : vf{};
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) acc[i][v] = start;
  }
  const Lane* pointers[ROWS];  // rows past the end repeat the last one and are not stored
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) pointers[i] = small + (i < rows ? i : rows - 1) * lds;
  tile<Lane, ROWS>(pointers, 1, w.at(panel), kPanel, w.depth, acc);
  const vf scale = splat(to.scale);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (i >= rows) break;
    T* out = to.out + i * to.ldo;
    const T* base = to.base ? to.base + i * to.ldbase : nullptr;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t c = c0 + v * kLanes;
      vf value = acc[i][v] * scale;
      if constexpr (MASKED) value = keep(value, lane_bits(to.bits + i * to.ldb, c - mask_c0));
      if (c + kLanes <= cols) {
        store(out + c, base ? load(base + c) + value : value);
      } else if (c < cols) {
        store_part(out + c, base ? load_part(base + c, cols - c) + value : value, cols - c);
      }
    }
  }
}

// Panels [begin, end) of rows x cols. small: rows x depth lanes. The mask's first column is mask_c0.
template <class Lane, class T>
void expand(const Lane* small, int64_t lds, int64_t rows, const PanelPack<Lane>& w, int64_t begin, int64_t end,
            int64_t cols, int64_t mask_c0, const ExpandTo<T>& to) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      ExpandTo<T> at = to;
      at.out += m * to.ldo;
      if (to.base) at.base += m * to.ldbase;
      if (to.bits) at.bits += m * to.ldb;
      const int64_t n = rows - m < kTileRows ? rows - m : kTileRows;
      auto run = [&](auto* f) { f(small + m * lds, lds, n, w, panel, cols, mask_c0, at); };
      if (n > 4 && kTileRows > 4)
        to.bits ? run(expand_tile<Lane, T, kTileRows, true>) : run(expand_tile<Lane, T, kTileRows, false>);
      else
        to.bits ? run(expand_tile<Lane, T, 4, true>) : run(expand_tile<Lane, T, 4, false>);
    }
  }
}

// small[rows, R] f32 as lanes along R, for expand: itself, or converted into `out`, the odd last half zero.
template <class Lane>
const Lane* lanes_along_r(const float* small, int64_t lds, int64_t rows, int64_t r, Lane* out) {
  if constexpr (kPerLane<Lane> == 1) {
    return small;
  } else {
    const int64_t depth = ceil_div(r, 2);
    for (int64_t m = 0; m < rows; ++m) {
      Bf16* to = &out[m * depth].first;
      int64_t j = 0;
      for (; j + kLanes <= r; j += kLanes) store(to + j, load(small + m * lds + j));
      if (j < r) store_part(to + j, load_part(small + m * lds + j, r - j), r - j);
      if (r % 2) to[r] = Bf16{0};
    }
    return out;
  }
}

// ---- outer

// small[M, R] for outer: lanes along M, [ceil(M / per lane), stride]; stride is R (+ 1 for a column of ones) rounded
// up to 4, zero filled.
template <class Lane>
struct TallPack {
  int64_t rows, width, stride;
  Buffer<Lane> data;
  TallPack(int64_t m, int64_t r, bool ones)
      : rows(m), width(r + (ones ? 1 : 0)), stride(round_up(width, 4)), data(ceil_div(m, kPerLane<Lane>) * stride) {}
  const Lane* at(int64_t m) const { return data.get() + m / kPerLane<Lane> * stride; }
  // Rows [begin, end) of small, f32 with row stride lds and r columns; begin is even.
  void fill(const float* small, int64_t lds, int64_t r, int64_t begin, int64_t end) {
    Lane* to = data.get() + begin / kPerLane<Lane> * stride;
    for (int64_t m = begin; m < end; m += kPerLane<Lane>, small += kPerLane<Lane> * lds, to += stride) {
      for (int64_t j = 0; j < r; j += kLanes) {
        const int64_t n = r - j;
        vf lanes = n >= kLanes ? load(small + j) : load_part(small + j, n);
        if constexpr (kPerLane<Lane> == 2) {
          vf next{};
          if (m + 1 < end) next = n >= kLanes ? load(small + lds + j) : load_part(small + lds + j, n);
          lanes = as_float(__builtin_convertvector(to_bf16(lanes), vu) |
                           __builtin_convertvector(to_bf16(next), vu) << 16);
        }
        store_lanes(to + j, lanes, stride - j);
      }
      for (int64_t j = r; j < stride; ++j) to[j] = Lane{};
      if (width > r) {
        if constexpr (kPerLane<Lane> == 2)
          to[r] = Lane{kBf16One, m + 1 < end ? kBf16One : Bf16{0}};
        else
          to[r] = 1.0f;
      }
    }
  }
};

// rows x kColBlock of the wide matrix from column c0 as lanes in `stage`, dropped and missing elements zero.
template <class Lane, class T, bool MASKED>
void stage_block(const T* x, int64_t ldx, int64_t rows, int64_t c0, int64_t cols, const uint8_t* bits, int64_t ldb,
                 Lane* stage) {
  for (int64_t m = 0; m < rows; m += kPerLane<Lane>) {
#pragma GCC unroll 16
    for (int v = 0; v < kColBlock / kLanes; ++v) {
      const int64_t c = c0 + v * kLanes, left = cols - c;
      vf lanes{};
#pragma GCC unroll 2
      for (int h = 0; h < kPerLane<Lane>; ++h) {
        if (left <= 0 || m + h >= rows) continue;
        const T* p = x + (m + h) * ldx + c;
        vf value = left >= kLanes ? load(p) : load_part(p, left);
        if constexpr (MASKED) value = keep(value, lane_bits(bits + (m + h) * ldb, v * kLanes));
        lanes = h == 0 && kPerLane<Lane> == 2 ? as_float(as_bits(value) >> 16) : as_float(as_bits(lanes) | as_bits(value));
      }
      __builtin_memcpy(stage + v * kLanes, &lanes, sizeof lanes);
    }
    stage += kColBlock;
  }
}

template <class Lane, int ROWS>
void outer_tile(const Lane* small, int64_t lds, const Lane* wide, int64_t sw, int64_t depth, float* sums) {
  vf acc[ROWS][kTileVecs];
  const Lane* pointers[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    pointers[i] = small + i;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] = load(sums + i * kColBlock + v * kLanes);
  }
  tile<Lane, ROWS>(pointers, lds, wide, sw, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) store(sums + i * kColBlock + v * kLanes, acc[i][v]);
}

// Scratch of one thread for outer.
template <class Lane>
struct OuterScratch {
  Buffer<Lane> stage{kOuterRows * kColBlock};
  Buffer<float> sums;
  explicit OuterScratch(int64_t stride) : sums(stride * kColBlock) {}
  void clear(int64_t stride) { std::memset(sums.get(), 0, static_cast<size_t>(stride * kColBlock) * sizeof(float)); }
};

// scratch.sums += small[m0 : m0 + rows]^T drop(x[m0 : m0 + rows, c0 : c0 + kColBlock]); rows <= kOuterRows.
template <class Lane, class T>
void outer_chunk(const T* x, int64_t ldx, int64_t m0, int64_t rows, int64_t c0, int64_t cols, const uint8_t* bits,
                 int64_t ldb, const TallPack<Lane>& small, const OuterScratch<Lane>& scratch) {
  const T* from = x + m0 * ldx;
  const Lane* wide = scratch.stage.get();
  int64_t sw = kColBlock;
  if constexpr (std::is_same_v<T, Lane>) {
    if (!bits && c0 + kColBlock <= cols) {
      wide = from + c0;
      sw = ldx;
    }
  }
  if (wide == scratch.stage.get()) {
    if (bits)
      stage_block<Lane, T, true>(from, ldx, rows, c0, cols, bits, ldb, scratch.stage.get());
    else
      stage_block<Lane, T, false>(from, ldx, rows, c0, cols, bits, ldb, scratch.stage.get());
  }
  const int64_t depth = ceil_div(rows, kPerLane<Lane>);
  for (int64_t r0 = 0; r0 < small.stride; r0 += kTileRows) {
    for (int64_t j = 0; j < kColBlock; j += kPanel) {
      float* sums = scratch.sums.get() + r0 * kColBlock + j;
      if (small.stride - r0 > 4 && kTileRows > 4)
        outer_tile<Lane, kTileRows>(small.at(m0) + r0, small.stride, wide + j, sw, depth, sums);
      else
        outer_tile<Lane, 4>(small.at(m0) + r0, small.stride, wide + j, sw, depth, sums);
    }
  }
}

// out[r, c] = scale * sums, for the columns of this block.
inline void outer_write(const float* sums, int64_t r, int64_t c0, int64_t cols, float scale, const Matrix& out) {
  const int64_t n = cols - c0 < kColBlock ? cols - c0 : kColBlock;
  float* to = out.as<float>() + c0 * out.col;
  if (out.col == 1) {
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < n; ++j) to[i * out.row + j] = scale * sums[i * kColBlock + j];
  } else {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < r; ++i) to[j * out.col + i * out.row] = scale * sums[i * kColBlock + j];
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
