// The pieces of prefix_attention: products, blocks of keys and values, masks, softmax. Read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int64_t kKeys = 64;     // keys of a block
constexpr int64_t kQueries = 48;  // queries of a block
constexpr int64_t kFew = 8;       // up to so many queries of a head of keys read these where they lie
constexpr int64_t kMaskBytes = kKeys / 8 + kMaskSlack;
static_assert(kKeys % kLanes == 0);

// ---- c[m, n] = factor (c +) a[m, k] b[k, n]: a by any strides, b and c row-major with n a multiple of kLanes

template <int ROWS, int VECS>
PEFTKERN_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb,
                                   int64_t rows, int64_t depth, float* c, int64_t ldc, bool add, float factor) {
  vf acc[ROWS][VECS];
  const float* from[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const int64_t m = i < rows ? i : rows - 1;  // rows past the end repeat the last one and are not stored
    from[i] = a + m * a_row;
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) acc[i][v] = add ? load(c + m * ldc + v * kLanes) : vf{};
  }
  int64_t at = 0;
  for (int64_t t = 0; t < depth; ++t, b += ldb, at += a_step) {
    vf w[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) w[v] = in_register(load(b + v * kLanes));
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const vf s = splat(from[i][at]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) acc[i][v] = mac<float>(acc[i][v], s, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) store(c + i * ldc + v * kLanes, acc[i][v] * splat(factor));
  }
}

template <int VECS>
void multiply_strip(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, int64_t m,
                    int64_t depth, float* c, int64_t ldc, bool add, float factor) {
  // 24 accumulators of 32 registers with AVX-512, 12 of 16 below.
  constexpr int kMost = (PEFTKERN_LEVEL >= 2 ? 24 : 12) / VECS, kRows = kMost < 6 ? kMost : 6;
  for (int64_t i = 0; i < m; i += kRows) {
    const int64_t rows = m - i < kRows ? m - i : kRows;
    multiply_tile<kRows, VECS>(a + i * a_row, a_row, a_step, b, ldb, rows, depth, c + i * ldc, ldc, add, factor);
  }
}

void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, int64_t m, int64_t n,
              int64_t depth, float* c, int64_t ldc, bool add, float factor = 1.0f) {
  // Of 16 registers, 12 accumulators leave room for two or three vectors of b and one of a, not for four.
  constexpr int kStrip = PEFTKERN_LEVEL >= 2 ? 4 : 2;
  int64_t j = 0;
  for (; n - j >= 4 * kLanes; j += kStrip * kLanes)
    multiply_strip<kStrip>(a, a_row, a_step, b + j, ldb, m, depth, c + j, ldc, add, factor);
  const int64_t vectors = (n - j) / kLanes;
  if (vectors == 3) multiply_strip<3>(a, a_row, a_step, b + j, ldb, m, depth, c + j, ldc, add, factor);
  if (vectors == 2) multiply_strip<2>(a, a_row, a_step, b + j, ldb, m, depth, c + j, ldc, add, factor);
  if (vectors == 1) multiply_strip<1>(a, a_row, a_step, b + j, ldb, m, depth, c + j, ldc, add, factor);
}

// ---- rows of vectors

template <class T>
void load_row(const T* from, int64_t d, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += kLanes) store(to + c, load_columns(from, c, d));
}
template <class T>
void store_row(const float* from, float scale, int64_t d, T* to) {
  for (int64_t c = 0; c < d; c += kLanes) store_columns(to, load(from + c) * splat(scale), c, d);
}
inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * splat(factor));
}
PEFTKERN_INLINE float sum_lanes(vf v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
inline float row_max(const float* p, int64_t width) {
  vf top = load(p);
  for (int64_t c = kLanes; c < width; c += kLanes) {
    const vf x = load(p + c);
    top = select(x > top, x, top);
  }
  float highest = top[0];
  for (int i = 1; i < kLanes; ++i) highest = std::fmax(highest, top[i]);
  return highest;
}
// p = exp(p - top), and its sum.
inline float exponentials(float* p, int64_t width, float top) {
  vf sum{};
  for (int64_t c = 0; c < width; c += kLanes) {
    const vf e = exp_of_negative(load(p + c) - splat(top));
    store(p + c, e);
    sum += e;
  }
  return sum_lanes(sum);
}
// dp becomes the gradient of the scores, p what is multiplied with the values.
inline void slopes(float* p, float* dp, int64_t width, float delta, const Attention& op, const uint8_t* bits) {
  for (int64_t c = 0; c < width; c += kLanes) {
    vf weight = load(p + c), slope = load(dp + c);
    const vf kept = weight;
    if (bits) {
      weight = keep(weight, lane_bits(bits, c)) * splat(op.drop.inverse_keep);
      slope = keep(slope, lane_bits(bits, c)) * splat(op.drop.inverse_keep);
      store(p + c, weight);
    }
    store(dp + c, kept * (slope - splat(delta)));
  }
}

// ---- keys and values of one head as f32: rows [n, width], and columns [d, kKeys] block after block

struct Blocks {
  int64_t d, n, width, count;
  bool backward;
  Buffer<float> k_cols, v_cols, k_row, v_row;
  Blocks(const Attention& op, bool both)
      : d(op.d),
        n(op.keys()),
        width(round_up(op.d, kLanes)),
        count(ceil_div(n, kKeys)),
        backward(both),
        k_cols(count * kKeys * d),
        v_cols(both ? count * kKeys * d : 0),
        k_row(count * kKeys * width),
        v_row(count * kKeys * width) {}
  int64_t size(int64_t block) const { return n - block * kKeys < kKeys ? n - block * kKeys : kKeys; }
  // The keys of a block as columns in whole vectors; those behind the last key are zero.
  int64_t padded(int64_t block) const { return round_up(size(block), kLanes); }
  const float* k_columns(int64_t block) const { return k_cols.get() + block * kKeys * d; }
  const float* v_columns(int64_t block) const { return v_cols.get() + block * kKeys * d; }
  const float* k_rows(int64_t block) const { return k_row.get() + block * kKeys * width; }
  const float* v_rows(int64_t block) const { return v_row.get() + block * kKeys * width; }

  template <class T>
  void fill(const Attention& op, int64_t b, int64_t h) {
    rows_of<T>(op.pk, op.k, op, b, h, k_row.get());
    rows_of<T>(op.pv, op.v, op, b, h, v_row.get());
    columns(k_row.get(), k_cols.get());
    if (backward) columns(v_row.get(), v_cols.get());
  }

 private:
  template <class T>
  void rows_of(const Heads& prefix, const Heads& text, const Attention& op, int64_t b, int64_t h, float* to) {
    const T *first = prefix.at<const T>(b, h), *rest = text.at<const T>(b, h);
    for (int64_t j = 0; j < op.t; ++j) load_row(first + j * prefix.row, d, width, to + j * width);
    for (int64_t j = 0; j < op.l; ++j) load_row(rest + j * text.row, d, width, to + (op.t + j) * width);
    std::memset(to + n * width, 0, static_cast<size_t>((round_up(n, kLanes) - n) * width) * sizeof(float));
  }
  void columns(const float* rows, float* to) const {
    for (int64_t block = 0; block < count; ++block, rows += kKeys * width, to += kKeys * d)
      for (int64_t j = 0; j < padded(block); j += kLanes)
        for (int64_t c = 0; c < d; ++c) {
          vf column;
          for (int i = 0; i < kLanes; ++i) column[i] = rows[(j + i) * width + c];
          store(to + c * kKeys + j, column);
        }
  }
};

struct Scratch {
  int64_t width;
  Buffer<float> q, o, p, dout, dp, dk, dv;
  Buffer<uint8_t> bits;
  Scratch(const Attention& op, bool backward)
      : width(round_up(op.d, kLanes)),
        q(kQueries * width),
        o(kQueries * width),
        p(kQueries * kKeys),
        dout(backward ? kQueries * width : 0),
        dp(backward ? kQueries * kKeys : 0),
        dk(backward ? round_up(op.keys(), kKeys) * width : 0),
        dv(backward ? round_up(op.keys(), kKeys) * width : 0),
        bits(op.drop.on ? kQueries * kMaskBytes : 0) {}
};

// Rows [row, row + rows) of the group's queries, row = (head in the group) * S + query, as f32.
template <class T>
void gather(const Heads& from, int64_t b, int64_t kvh, int64_t group, int64_t s, int64_t row, int64_t rows, int64_t d,
            int64_t width, float* to, T*) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = from.at<const T>(b, kvh * group + (row + i) / s) + (row + i) % s * from.row;
    load_row(x, d, width, to + i * width);
  }
}

// ---- which keys a block of queries sees

class Rows {
 public:
  Rows(const Attention& op, int64_t b, int64_t kvh, int64_t row, int64_t rows)
      : op_(op), b_(b), first_head_(kvh * op.group()), row_(row), rows_(rows) {
    if (op.drop.on)
      for (int64_t i = 0; i < rows; ++i) keys_[i] = row_key(op.drop.seed, index(i));
  }
  std::pair<int64_t, int64_t> place(int64_t i) const { return {first_head_ + (row_ + i) / op_.s, (row_ + i) % op_.s}; }
  int64_t index(int64_t i) const {
    const auto [h, s] = place(i);
    return (b_ * op_.hq + h) * op_.s + s;
  }
  // Highest score and sum apart: exp(score - log-sum-exp) would lose the digits that the score has before the point.
  void note(int64_t i, float top, float sum) const {
    const int64_t at = index(i);
    op_.top[at] = top, op_.sum[at] = sum;
  }
  // Scores to weights.
  void weights(int64_t i, int64_t width, float* p) const {
    const int64_t at = index(i);
    exponentials(p, width, op_.top[at]);
    scale_row(p, width, 1.0f / op_.sum[at]);
  }
  // Whether no query sees any of the keys [j0, j0 + n).
  bool hidden(int64_t j0, int64_t n) const {
    if (j0 < op_.t) return false;
    if (op_.causal) {
      bool all = true;
      for (int64_t i = 0; i < rows_ && all; ++i) all = op_.seen(place(i).second) <= j0;
      if (all) return true;
    }
    if (!op_.mask || !op_.mask_is_bool) return false;
    for (int64_t i = 0; i < rows_; ++i)
      if (std::memchr(mask_row<uint8_t>(i) + j0 - op_.t, 1, static_cast<size_t>(n))) return false;
    return true;
  }
  // -inf for what is not seen, and the additive mask; columns from n on are never seen.
  void mask(int64_t j0, int64_t n, float* p) const {
    const int64_t text = j0 < op_.t ? op_.t - j0 : 0;  // first column of the text
    for (int64_t i = 0; i < rows_; ++i, p += kKeys) {
      int64_t seen = n;
      if (op_.causal) {
        seen = op_.seen(place(i).second) - j0;
        seen = seen < 0 ? 0 : seen < n ? seen : n;
      }
      if (op_.mask && text < seen) {
        if (op_.mask_is_bool) {
          const uint8_t* keep = mask_row<uint8_t>(i) + j0 - op_.t;
          for (int64_t j = text; j < seen; ++j) p[j] = keep[j] ? p[j] : -INFINITY;
        } else {
          const float* add = mask_row<float>(i) + j0 - op_.t;
          for (int64_t j = text; j < seen; ++j) p[j] += add[j];
        }
      }
      for (int64_t j = seen; j < round_up(n, kLanes); ++j) p[j] = -INFINITY;
    }
  }
  void keep(int64_t j0, int64_t n, uint8_t* bits) const {
    keep_bits(keys_, rows_, j0, n, op_.drop.threshold, bits, kMaskBytes);
  }
  void drop(int64_t j0, int64_t n, float* p, uint8_t* bits) const {
    keep(j0, n, bits);
    for (int64_t i = 0; i < rows_; ++i, bits += kMaskBytes, p += kKeys)
      for (int64_t c = 0; c < n; c += kLanes) store(p + c, PEFTKERN_ISA::keep(load(p + c), lane_bits(bits, c)));
  }

 private:
  template <class M>
  const M* mask_row(int64_t i) const {
    const auto [h, s] = place(i);
    return static_cast<const M*>(op_.mask) + b_ * op_.mask_batch + h * op_.mask_head + s * op_.mask_row;
  }

  const Attention& op_;
  int64_t b_, first_head_, row_, rows_;
  RowKey keys_[kQueries];
};

// ---- few queries: keys and values are read once, where they lie

template <class T>
void decode_keys(const T* k, int64_t ldk, int64_t n, const float* q, int64_t rows, int64_t d, int64_t width,
                 float scale, float* p) {
  for (int64_t j = 0; j < n; j += 4) {
    const T* from[4];
    for (int64_t u = 0; u < 4; ++u) from[u] = k + (j + u < n ? j + u : n - 1) * ldk;
    for (int64_t i = 0; i < rows; ++i) {
      vf acc[4] = {};
      for (int64_t c = 0; c < d; c += kLanes) {
        const vf x = load(q + i * width + c);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) acc[u] = mac<float>(acc[u], load_columns(from[u], c, d), x);
      }
      const v4 sums = sum4(acc[0], acc[1], acc[2], acc[3]) * scale;
      for (int64_t u = 0; u < 4 && j + u < n; ++u) p[i * kKeys + j + u] = sums[u];
    }
  }
}

template <class T>
void decode_values(const T* v, int64_t ldv, int64_t n, const float* p, int64_t rows, int64_t d, int64_t width,
                   float* o) {
  for (int64_t c = 0; c < d; c += kLanes)
    for (int64_t i = 0; i < rows; i += 4) {
      const int64_t r[4] = {i, i + 1 < rows ? i + 1 : i, i + 2 < rows ? i + 2 : i, i + 3 < rows ? i + 3 : i};
      vf acc[4] = {};
      for (int64_t j = 0; j < n; ++j) {
        const vf x = load_columns(v + j * ldv, c, d);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) acc[u] = mac<float>(acc[u], x, splat(p[r[u] * kKeys + j]));
      }
      for (int64_t u = 0; u < 4 && i + u < rows; ++u) {
        float* to = o + (i + u) * width + c;
        store(to, load(to) + acc[u]);
      }
    }
}

template <class T>
void decode(const Attention& op) {
  const int64_t rows = op.group() * op.s, n = op.keys();
  for_tasks(op.b * op.hkv, rows * n * op.d * 2, [&](int64_t begin, int64_t end) {
    Scratch w(op, false);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / op.hkv, kvh = task % op.hkv;
      gather(op.q, b, kvh, op.group(), op.s, 0, rows, op.d, w.width, w.q.get(), static_cast<T*>(nullptr));
      const Rows at(op, b, kvh, 0, rows);
      float highest[kFew], sum[kFew];
      for (int64_t i = 0; i < rows; ++i) highest[i] = -INFINITY, sum[i] = 0.0f;
      std::memset(w.o.get(), 0, static_cast<size_t>(rows * w.width) * sizeof(float));
      for (int64_t j0 = 0; j0 < n; j0 += kKeys) {
        const int64_t size = n - j0 < kKeys ? n - j0 : kKeys, padded = round_up(size, kLanes);
        if (at.hidden(j0, size)) continue;
        // The part of the prefix, then that of the text.
        const int64_t split = op.t <= j0 ? 0 : op.t - j0 < size ? op.t - j0 : size;
        const T *pk = op.pk.at<const T>(b, kvh) + j0 * op.pk.row, *pv = op.pv.at<const T>(b, kvh) + j0 * op.pv.row;
        const T* k = op.k.at<const T>(b, kvh) + (j0 + split - op.t) * op.k.row;
        const T* v = op.v.at<const T>(b, kvh) + (j0 + split - op.t) * op.v.row;
        float* p = w.p.get();
        if (split > 0) decode_keys(pk, op.pk.row, split, w.q.get(), rows, op.d, w.width, op.scale, p);
        if (split < size) decode_keys(k, op.k.row, size - split, w.q.get(), rows, op.d, w.width, op.scale, p + split);
        at.mask(j0, size, p);
        for (int64_t i = 0; i < rows; ++i) {
          const float top = std::fmax(highest[i], row_max(p + i * kKeys, padded)), fade = std::exp(highest[i] - top);
          sum[i] = sum[i] * fade + exponentials(p + i * kKeys, padded, top);
          highest[i] = top;
          scale_row(w.o.get() + i * w.width, w.width, fade);
        }
        if (op.drop.on) at.drop(j0, size, p, w.bits.get());
        if (split > 0) decode_values(pv, op.pv.row, split, p, rows, op.d, w.width, w.o.get());
        if (split < size) decode_values(v, op.v.row, size - split, p + split, rows, op.d, w.width, w.o.get());
      }
      for (int64_t i = 0; i < rows; ++i) {
        const auto [h, s] = at.place(i);
        store_row(w.o.get() + i * w.width, op.drop.inverse_keep / sum[i], op.d, op.out.at<T>(b, h) + s * op.out.row);
        at.note(i, highest[i], sum[i]);
      }
    }
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
