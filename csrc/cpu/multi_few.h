// multi_low_rank of an adapter's few rows, as in decoding: packing A and B would cost more than the products, so that
// they are multiplied with A and B where those stand. Read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int64_t kFewRows = 48;  // packing A and B costs about as much as the products of so many rows

bool is_few(const MultiLowRank& op, const Adapter& adapter) { return adapter.count <= kFewRows && !op.drop.on; }

constexpr int kFewDots = 3;  // rows that meet 4 of A at a time: nothing is masked, so that 12 accumulators fit anywhere

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, class P, int ROWS, bool WHOLE>
PEFTKERN_INLINE void dot_step(const T* const (&x)[ROWS], const P* const (&a)[4], int64_t c, int64_t left,
                              vf (&acc)[ROWS][4]) {
  vf xs[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) xs[i] = WHOLE ? load(x[i] + c) : load_part(x[i] + c, left);
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    const vf w = in_register(WHOLE ? load(a[j] + c) : load_part(a[j] + c, left));
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) acc[i][j] = mac<float>(acc[i][j], xs[i], w);
  }
}

// h[i][j] = x[rows[i]] . a[j] over K, for ROWS rows of x and 4 of a.
template <class T, class P, int ROWS>
void dots(const MultiLowRank& op, const int64_t* rows, const P* const (&a)[4], v4* h) {
  const T* x[ROWS];
  vf acc[ROWS][4];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    x[i] = op.x.as<const T>() + rows[i] * op.x.row;
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) acc[i][j] = vf{};
  }
  int64_t c = 0;
  for (; c + kLanes <= op.k; c += kLanes) dot_step<T, P, ROWS, true>(x, a, c, kLanes, acc);
  if (c < op.k) dot_step<T, P, ROWS, false>(x, a, c, op.k - c, acc);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) h[i] = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

// h[m, r0 : r0 + 4] of all rows of one adapter.
template <class T, class P>
void shrink_few(const MultiLowRank& op, const Adapter& adapter, int64_t r0) {
  const P* a[4];
  for (int j = 0; j < 4; ++j) a[j] = adapter.a.as<const P>() + least(r0 + j, adapter.r - 1) * op.k;
  const int64_t ranks = least(4, adapter.r - r0);
  const int64_t* order = op.order + adapter.begin;
  for (int64_t i = 0; i < adapter.count; i += kFewDots) {
    const int64_t rows = least(kFewDots, adapter.count - i);
    v4 sums[kFewDots];
    if (rows == kFewDots)
      dots<T, P, kFewDots>(op, order + i, a, sums);
    else if (rows == 2)
      dots<T, P, 2>(op, order + i, a, sums);
    else
      dots<T, P, 1>(op, order + i, a, sums);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t r = 0; r < ranks; ++r) op.h.as<float>()[order[i + j] * op.most + r0 + r] = sums[j][r];
  }
}

PEFTKERN_INLINE v4 load4(const float* p) { return load_as<v4>(p); }
template <class P>
PEFTKERN_INLINE v4 load4(const P* p) {
  return v4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

// panel[r, kPanel] = b[n : n + kPanel, r]^T in f32, zeros past `cols` rows of b; r columns.
template <class P>
void transpose_panel(const P* b, int64_t r, int64_t cols, float* panel) {
  for (int64_t n = 0; n < kPanel; n += 4) {
    int64_t t = 0;
    for (; n + 4 <= cols && t + 4 <= r; t += 4) {
      const P* from = b + n * r + t;
      const v4 p = load4(from), q = load4(from + r), s = load4(from + 2 * r), u = load4(from + 3 * r);
      const v4 pq0 = __builtin_shufflevector(p, q, 0, 4, 1, 5), pq1 = __builtin_shufflevector(p, q, 2, 6, 3, 7);
      const v4 su0 = __builtin_shufflevector(s, u, 0, 4, 1, 5), su1 = __builtin_shufflevector(s, u, 2, 6, 3, 7);
      const v4 columns[4] = {
          __builtin_shufflevector(pq0, su0, 0, 1, 4, 5), __builtin_shufflevector(pq0, su0, 2, 3, 6, 7),
          __builtin_shufflevector(pq1, su1, 0, 1, 4, 5), __builtin_shufflevector(pq1, su1, 2, 3, 6, 7)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) __builtin_memcpy(panel + (t + j) * kPanel + n, &columns[j], sizeof columns[j]);
    }
    for (; t < r; ++t)
      for (int64_t j = n; j < n + 4; ++j) panel[t * kPanel + j] = j < cols ? to_float(b[j * r + t]) : 0.0f;
  }
}

// y[rows, n0 : n0 + kPanel] += scale * h[rows, r] panel
template <class T, int ROWS>
void expand_rows(const MultiLowRank& op, const Adapter& adapter, const int64_t* rows, int64_t n0, const float* panel) {
  vf acc[ROWS][kTileVecs];
  T* y[ROWS];
  const float* h[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    y[i] = op.y.as<T>() + rows[i] * op.y.row;
    h[i] = op.h.as<float>() + rows[i] * op.most;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] = vf{};
  }
  for (int64_t t = 0; t < adapter.r; ++t, panel += kPanel) {
    vf w[kTileVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) w[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const vf s = splat(adapter.scale * h[i][t]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) acc[i][v] = mac<float>(acc[i][v], s, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v)
      store_columns(y[i], load_columns(y[i], n0 + v * kLanes, op.n) + acc[i][v], n0 + v * kLanes, op.n);
}

template <class T, class P>
void expand_few(const MultiLowRank& op, const Adapter& adapter, int64_t n0, float* panel) {
  transpose_panel(adapter.b.as<const P>() + n0 * adapter.r, adapter.r, op.n - n0, panel);
  const int64_t* rows = op.order + adapter.begin;
  int64_t left = adapter.count;
  for (; left >= 4; left -= 4, rows += 4) expand_rows<T, 4>(op, adapter, rows, n0, panel);
  if (left >= 2) expand_rows<T, 2>(op, adapter, rows, n0, panel), rows += 2, left -= 2;
  if (left) expand_rows<T, 1>(op, adapter, rows, n0, panel);
}

// f(adapter, j) for j < parts(adapter), over all adapters with few rows, in parallel.
template <class Parts, class F>
void for_parts(const MultiLowRank& op, int64_t work, const Parts& parts, const F& f) {
  Buffer<int64_t> ends(op.count);
  int64_t total = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    const Adapter& adapter = op.adapters[i];
    if (adapter.count > 0 && is_few(op, adapter)) total += parts(adapter);
    ends.get()[i] = total;
  }
  if (total == 0) return;
  for_tasks(total, work, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(op.most * kPanel);
    int64_t i = 0;
    for (int64_t task = begin; task < end; ++task) {
      while (ends.get()[i] <= task) ++i;
      const int64_t first = i > 0 ? ends.get()[i - 1] : 0;
      f(op.adapters[i], task - first, scratch.get());
    }
  });
}

template <class T>
void forward_few(const MultiLowRank& op) {
  const auto blocks = [](const Adapter& adapter) { return ceil_div(adapter.r, 4); };
  for_parts(op, 16 * op.k, blocks, [&](const Adapter& adapter, int64_t block, float*) {
    with_dtype(adapter.a.dtype,
               [&](auto* p) { shrink_few<T, std::remove_pointer_t<decltype(p)> >(op, adapter, block * 4); });
  });
  const auto panels = [&](const Adapter&) { return ceil_div(op.n, kPanel); };
  for_parts(op, 4 * kPanel * op.most, panels, [&](const Adapter& adapter, int64_t panel, float* scratch) {
    with_dtype(adapter.b.dtype, [&](auto* p) {
      expand_few<T, std::remove_pointer_t<decltype(p)> >(op, adapter, panel * kPanel, scratch);
    });
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
