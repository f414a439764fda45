// out[M, C] = base + drop(scale * small[M, R] w[R, C] + bias). Part of skinny.h, read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

// w[R, C] for expand: panels of kPanel columns; in a panel row after row (pairs of rows for Bf16Pair). Zero filled.
template <class Lane>
struct PanelPack {
  int64_t depth, panels;  // lanes along R, panels along C
  Buffer<Lane> data;
  PanelPack(int64_t r, int64_t c)
      : depth(padded(ceil_div(r, kPerLane<Lane>))), panels(ceil_div(c, kPanel)), data(depth * panels * kPanel) {}
  static int64_t padded(int64_t depth) { return depth <= kStill ? round_up(depth, kStill / 2) : depth; }
  Lane* at(int64_t panel) const { return data.get() + panel * depth * kPanel; }
};

// n columns of rows a and b (null: zeros) as pairs, and zeros behind them.
PEFTKERN_INLINE void pack_pairs(const Bf16* a, const Bf16* b, int64_t stride, int64_t n, Bf16Pair* to) {
  if (stride == 1 && n == kPanel && b) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const vu pairs = widen(load_as<vh>(a + v)) | widen(load_as<vh>(b + v)) << 16;
      __builtin_memcpy(to + v, &pairs, sizeof pairs);
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) to[j] = {a[j * stride], b ? b[j * stride] : Bf16{}};
  for (int64_t j = n; j < kPanel; ++j) to[j] = {};
}

template <class Lane, class P>
void pack_panels(const PanelPack<Lane>& pack, const Matrix& w, int64_t rows, int64_t cols, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t c0 = panel * kPanel, inside = cols - c0 < kPanel ? cols - c0 : kPanel;
    Lane* to = pack.at(panel);
    for (int64_t t = 0; t < pack.depth; ++t, to += kPanel) {
      const int64_t r = t * kPerLane<Lane>, n = r < rows ? inside : 0;
      const P* from = w.as<const P>() + r * w.row + c0 * w.col;
      if constexpr (kPerLane<Lane> == 2)
        pack_pairs(from, r + 1 < rows ? from + w.row : nullptr, w.col, n, to);
      else
        pack_line(from, w.col, n, kPanel, to);
    }
  }
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

// Where expand writes: out = base + drop(product + bias) or, with a scale, scale * (base + drop(product)) + bias. base
// may be out itself, another matrix or null (zero).
template <class T>
struct ExpandTo {
  T* out;
  int64_t ldo;
  const T* base;
  int64_t ldbase;
  const float* bias;    // [panels * kPanel] or null
  const uint8_t* bits;  // of column mask_c0 on, readable for whole tiles of rows, or null
  int64_t ldb;
  int64_t mask_c0;
  const float* scale = nullptr;  // [panels * kPanel] or null
  PEFTKERN_INLINE bool bias_first() const { return bias && !scale; }
  PEFTKERN_INLINE vf first(int64_t c) const { return bias_first() ? load(bias + c) : vf{}; }
  PEFTKERN_INLINE vf last(vf value, int64_t c) const {
    if (!scale) return value;
    return bias ? value * load(scale + c) + load(bias + c) : value * load(scale + c);
  }
  ExpandTo rows_from(int64_t m) const {
    ExpandTo at = *this;
    at.out += m * ldo;
    if (base) at.base += m * ldbase;
    if (bits) at.bits += m * ldb;
    return at;
  }
};

// The products of one tile take longer than a cache miss, so its successor's lines are asked for first.
template <class T>
PEFTKERN_INLINE void prefetch_tile(const ExpandTo<T>& at, int64_t rows, int64_t c0) {
  constexpr int kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < kPanel; c += kLine) __builtin_prefetch(at.out + i * at.ldo + c0 + c, 1);
    if (at.base && at.base != at.out)
      for (int c = 0; c < kPanel; c += kLine) __builtin_prefetch(at.base + i * at.ldbase + c0 + c, 0);
  }
}

template <class Lane, class T, int ROWS, bool MASKED>
void expand_tile(const Lane* small, int64_t lds, int64_t rows, const PanelPack<Lane>& w, int64_t panel, int64_t cols,
                 const ExpandTo<T>& to) {
  const int64_t c0 = panel * kPanel;
  vf acc[ROWS][kTileVecs];
  const Lane* pointers[ROWS];
  // Rows past the end repeat the last one and are not stored.
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const int64_t m = i < rows ? i : rows - 1;
    pointers[i] = small + m * lds;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] = vf{};
  }
  tile<Lane, ROWS>(pointers, 1, Packed<Lane>{w.at(panel), kPanel}, w.depth, acc);
  auto each = [&](auto f) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) f(acc[i][v], i, c0 + v * kLanes);
  };
  // Bias and base last: every one of many small terms added to a large one would be rounded at its size.
  if (to.bias_first()) each([&](vf& value, int, int64_t c) { value += to.first(c); });
  if constexpr (MASKED)
    each([&](vf& value, int i, int64_t c) { value = keep(value, lane_bits(to.bits + i * to.ldb, c - to.mask_c0)); });
  // Whole tiles apart, each option tested once: a branch per vector took as long as the products of a small depth.
  if (rows >= ROWS && c0 + kPanel <= cols) {
    if (to.base) each([&](vf& value, int i, int64_t c) { value += load(to.base + i * to.ldbase + c); });
    if (to.scale) each([&](vf& value, int, int64_t c) { value = to.last(value, c); });
    each([&](vf& value, int i, int64_t c) { store(to.out + i * to.ldo + c, value); });
  } else {
    each([&](vf& value, int i, int64_t c) {
      if (i >= rows) return;
      if (to.base) value += load_columns(to.base + i * to.ldbase, c, cols);
      store_columns(to.out + i * to.ldo, to.last(value, c), c, cols);
    });
  }
}

template <class Lane, class T>
void expand_tile_of(const Lane* small, int64_t lds, int64_t rows, const PanelPack<Lane>& w, int64_t panel, int64_t cols,
                    const ExpandTo<T>& to) {
  if (kTileRows > 4 && rows > 4)
    to.bits ? expand_tile<Lane, T, kTileRows, true>(small, lds, rows, w, panel, cols, to)
            : expand_tile<Lane, T, kTileRows, false>(small, lds, rows, w, panel, cols, to);
  else
    to.bits ? expand_tile<Lane, T, 4, true>(small, lds, rows, w, panel, cols, to)
            : expand_tile<Lane, T, 4, false>(small, lds, rows, w, panel, cols, to);
}

// One full panel with w held in registers: for small depths the tile above spends as long on its edges as inside.
template <class Lane, class T, int DEPTH, bool MASKED>
void expand_still(const Lane* small, int64_t rows, const PanelPack<Lane>& w, int64_t panel, const ExpandTo<T>& to) {
  constexpr int64_t kAhead = 16;  // rows
  const int64_t c0 = panel * kPanel;
  vf ws[DEPTH][kTileVecs], bias[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    bias[v] = to.first(c0 + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < DEPTH; ++t) ws[t][v] = in_register(load_lanes(w.at(panel) + t * kPanel + v * kLanes));
  }
  T* out = to.out + c0;
  const T* base = to.base ? to.base + c0 : nullptr;
  const uint8_t* bits = to.bits;
  for (int64_t m = 0; m < rows; ++m, small += DEPTH, out += to.ldo) {
    prefetch_tile(to.rows_from(m + kAhead < rows ? m + kAhead : m + kAhead - rows), 1,
                  m + kAhead < rows ? c0 : c0 + kPanel);
    vf acc[kTileVecs] = {};
#pragma GCC unroll 8
    for (int t = 0; t < DEPTH; ++t) {
      const vf s = splat_lane(small + t);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) acc[v] = mac<Lane>(acc[v], s, ws[t][v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) {
      acc[v] += bias[v];
      if constexpr (MASKED) acc[v] = keep(acc[v], lane_bits(bits, c0 - to.mask_c0 + v * kLanes));
      if (base) acc[v] += load(base + v * kLanes);
      store(out + v * kLanes, to.last(acc[v], c0 + v * kLanes));
    }
    if (base) base += to.ldbase;
    if constexpr (MASKED) bits += to.ldb;
  }
}

// Panels [begin, end) of rows x cols. small: rows x depth lanes.
template <class Lane, class T>
void expand(const Lane* small, int64_t rows, const PanelPack<Lane>& w, int64_t begin, int64_t end, int64_t cols,
            const ExpandTo<T>& to) {
  const int64_t lds = w.depth;
  if (PEFTKERN_LEVEL >= 2 && w.depth <= kStill && rows >= kTileRows) {
    for (; begin < end && (begin + 1) * kPanel <= cols; ++begin) {
      if (w.depth == kStill)
        to.bits ? expand_still<Lane, T, kStill, true>(small, rows, w, begin, to)
                : expand_still<Lane, T, kStill, false>(small, rows, w, begin, to);
      else
        to.bits ? expand_still<Lane, T, kStill / 2, true>(small, rows, w, begin, to)
                : expand_still<Lane, T, kStill / 2, false>(small, rows, w, begin, to);
    }
  }
  // Along the rows first while w stays in L2: out and base are then read and written in streams.
  const bool along_rows = w.depth * (end - begin) * kPanel * 4 <= kL2Share;
  int64_t m = 0, panel = begin;
  while (m < rows && panel < end) {
    int64_t next_m = m, next_panel = panel;
    if (along_rows) {
      if (++next_panel == end) next_panel = begin, next_m += kTileRows;
    } else {
      if ((next_m += kTileRows) >= rows) next_m = 0, ++next_panel;
    }
    if (next_m < rows && next_panel < end)
      prefetch_tile(to.rows_from(next_m), rows - next_m < kTileRows ? rows - next_m : kTileRows, next_panel * kPanel);
    expand_tile_of(small + m * lds, lds, rows - m < kTileRows ? rows - m : kTileRows, w, panel, cols, to.rows_from(m));
    m = next_m, panel = next_panel;
  }
}

// scale * small[rows, R] as `depth` lanes a row, for expand; zeros fill up.
template <class Lane>
void lanes_along_r(const float* small, int64_t rows, int64_t r, float scale, int64_t depth, Lane* out) {
  using Element = std::conditional_t<kPerLane<Lane> == 2, Bf16, float>;
  const vf factor = splat(scale);
  Element* to = reinterpret_cast<Element*>(out);
  for (int64_t m = 0; m < rows; ++m, small += r, to += depth * kPerLane<Lane>) {
    int64_t j = 0;
    for (; j + kLanes <= r; j += kLanes) store(to + j, load(small + j) * factor);
    if (j < r) store_part(to + j, load_part(small + j, r - j) * factor, r - j);
    for (j = r; j < depth * kPerLane<Lane>; ++j) to[j] = Element{};
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
