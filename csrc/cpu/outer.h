// out[R, C] = scale * small[M, R]^T drop(wide[M, C]). Part of skinny.h, read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

template <class Lane>
PEFTKERN_INLINE void store_lanes(Lane* p, vf lanes, int64_t n) {
  if (n >= kLanes)
    __builtin_memcpy(p, &lanes, sizeof lanes);
  else
    store_part(reinterpret_cast<float*>(p), lanes, n);
}

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
  void fill(const float* small, int64_t lds, int64_t r, int64_t begin, int64_t end) const {
    Lane* to = data.get() + begin / kPerLane<Lane> * stride;
    for (int64_t m = begin; m < end; m += kPerLane<Lane>, small += kPerLane<Lane> * lds, to += stride) {
      for (int64_t j = 0; j < r; j += kLanes) {
        const int64_t n = r - j;
        vf lanes = n >= kLanes ? load(small + j) : load_part(small + j, n);
        if constexpr (kPerLane<Lane> == 2) {
          vf next{};
          if (m + 1 < end) next = n >= kLanes ? load(small + lds + j) : load_part(small + lds + j, n);
          lanes = as_float(widen(to_bf16(lanes)) | widen(to_bf16(next)) << 16);
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
template <class T, bool MASKED>
void stage_block(const T* x, int64_t ldx, int64_t rows, int64_t left, const uint8_t* bits, int64_t ldb, float* stage) {
  for (int64_t m = 0; m < rows; ++m, x += ldx, stage += kColBlock<T>) {
    __builtin_prefetch(x + kRowChunk * ldx, 0, 2);
    __builtin_prefetch(x + kRowChunk * ldx + kColBlock<T> / 3, 0, 2);
    __builtin_prefetch(x + kRowChunk * ldx + kColBlock<T> / 3 * 2, 0, 2);
    stage_line<MASKED>(x, 0, kColBlock<T>, left, bits + m * ldb, stage);
  }
}

#if PEFTKERN_LEVEL >= 3
// The same for pairs: rows 2t and 2t + 1 interleaved.
template <class T, bool MASKED>
void stage_block(const T* x, int64_t ldx, int64_t rows, int64_t left, const uint8_t* bits, int64_t ldb,
                 Bf16Pair* stage) {
  static_assert(std::is_same_v<T, Bf16>);
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t m = 0; m < rows; m += 2, x += 2 * ldx, stage += kColBlock<T>) {
#pragma GCC unroll 4
    for (int c = 0; c < kColBlock<T>; c += 32) {
      __builtin_prefetch(x + kRowChunk * ldx + c, 0, 2);
      __builtin_prefetch(x + (kRowChunk + 1) * ldx + c, 0, 2);
      const uint32_t inside = left - c >= 32 ? ~0u : left <= c ? 0u : (1u << (left - c)) - 1u;
      uint32_t first = inside, second = m + 1 < rows ? inside : 0u;
      if constexpr (MASKED) {
        uint32_t kept;
        __builtin_memcpy(&kept, bits + m * ldb + c / 8, sizeof kept);
        first &= kept;
        if (second) {
          __builtin_memcpy(&kept, bits + (m + 1) * ldb + c / 8, sizeof kept);
          second &= kept;
        }
      }
      const __m512i a = _mm512_maskz_loadu_epi16(first, x + c), b = _mm512_maskz_loadu_epi16(second, x + ldx + c);
      _mm512_storeu_si512(stage + c, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(stage + c + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
#endif

// sums[c] += x[:, c] . y[:, c] for rows x kColBlock of two wide matrices, of which `left` columns are there. As below,
// chunks of rows are summed apart.
template <class T>
void column_dots(const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t rows, int64_t left, float* sums) {
  constexpr int kVecs = kColBlock<T> / kLanes;
  constexpr int64_t kAhead = 8;  // rows
  vf acc[kVecs] = {};
  for (int64_t m = 0; m < rows; ++m, x += ldx, y += ldy) {
    for (int c = 0; c < kColBlock<T>; c += 64 / static_cast<int>(sizeof(T)))
      __builtin_prefetch(y + kAhead * ldy + c, 0, 2);
#pragma GCC unroll 32
    for (int v = 0; v < kVecs; ++v) acc[v] += load_columns(x, v * kLanes, left) * load_columns(y, v * kLanes, left);
  }
#pragma GCC unroll 32
  for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, load(sums + v * kLanes) + acc[v]);
}

template <class Lane, int ROWS, class Wide>
void outer_tile(const Lane* small, int64_t lds, Wide wide, int64_t depth, float* sums, int64_t ldsums) {
  vf acc[ROWS][kTileVecs];
  const Lane* pointers[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    pointers[i] = small + i;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] = vf{};
  }
  tile<Lane, ROWS>(pointers, lds, wide, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) {
      // Chunks are summed apart and then added up: one chain over thousands of rows would cost a digit of f32.
      float* to = sums + i * ldsums + v * kLanes;
      store(to, load(to) + acc[i][v]);
    }
}

template <class P>
void write_line(const float* from, int64_t n, float scale, P* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const vf value = n - j < kLanes ? load_part(from + j, n - j) : load(from + j);
    store_columns(to, value * splat(scale), j, n);
  }
}

// to[cols, rows] = from[rows, cols]^T. By value: through a closure the sizes would be read again after every store.
[[maybe_unused]] void turn(const float* from, int64_t ldf, int64_t rows, int64_t cols, float* to) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) *to++ = from[i * ldf + j];
}

// The column sums of one block of kColBlock columns, built up over chunks of rows.
template <class Lane, class T>
class Outer {
 public:
  explicit Outer(const TallPack<Lane>& small) : small_(small), sums_(small.stride * kColBlock<T>) {
    std::memset(sums_.get(), 0, static_cast<size_t>(small_.stride * kColBlock<T>) * sizeof(float));
  }

  // sums += small[m : m + rows]^T drop(x[m : m + rows, c0 : c0 + kColBlock]); rows <= kRowChunk, m even. The bits are
  // those of row m from column c0 on.
  void add(const T* x, int64_t ldx, int64_t m, int64_t rows, int64_t c0, int64_t cols, const uint8_t* bits,
           int64_t ldb) {
    const T* from = x + m * ldx + c0;
    const int64_t left = cols - c0;
    if constexpr (kPerLane<Lane> == 1) {
      // Staging pays where more than one tile reads what it converts and masks.
      const bool once = small_.stride <= (std::is_same_v<T, float> && !bits ? kUnstagedOuter : kTileRows);
      if (once && left >= kColBlock<T>) {
        if (bits)
          tiles(m, rows, [&](int64_t c) { return Direct<T, true>{from + c, ldx, bits, ldb, c}; });
        else
          tiles(m, rows, [&](int64_t c) { return Direct<T, false>{from + c, ldx, nullptr, 0, c}; });
        return;
      }
    }
    if (bits)
      stage_block<T, true>(from, ldx, rows, left, bits, ldb, stage_);
    else
      stage_block<T, false>(from, ldx, rows, left, bits, ldb, stage_);
    tiles(m, rows, [&](int64_t c) { return Packed<Lane>{stage_ + c, kColBlock<T>}; });
  }

  // out[r, c0 : ...] = scale * sums of row r0 + r, for r < n; out lies row by row or column by column.
  void write(int64_t r0, int64_t n, int64_t c0, int64_t cols, float scale, const Matrix& out) const {
    const int64_t width = cols - c0 < kColBlock<T> ? cols - c0 : kColBlock<T>;
    with_dtype(out.dtype, [&](auto* p) {
      auto* to = out.as<std::remove_pointer_t<decltype(p)>>() + c0 * out.col;
      if (out.col == 1) {
        for (int64_t i = 0; i < n; ++i) write_line(row(r0 + i), width, scale, to + i * out.row);
      } else {
        // All turned before any is read: a vector read at once waits until the scalars it spans have left the core.
        Buffer<float> lines(n * width);
        turn(row(r0), kColBlock<T>, n, width, lines.get());
        for (int64_t j = 0; j < width; ++j) write_line(lines.get() + j * n, n, scale, to + j * out.col);
      }
    });
  }
  const float* row(int64_t r) const { return sums_.get() + r * kColBlock<T>; }

 private:
  template <class F>
  void tiles(int64_t m, int64_t rows, const F& wide) {
    const int64_t depth = ceil_div(rows, kPerLane<Lane>), lds = small_.stride;
    for (int64_t r = 0; r < small_.stride; r += kTileRows) {
      const Lane* small = small_.at(m) + r;
      for (int64_t c = 0; c < kColBlock<T>; c += kPanel) {
        float* sums = sums_.get() + r * kColBlock<T> + c;
        if (kTileRows > 4 && small_.stride - r > 4)
          outer_tile<Lane, kTileRows>(small, lds, wide(c), depth, sums, kColBlock<T>);
        else if (small_.width - r == 1)
          outer_tile<Lane, 1>(small, lds, wide(c), depth, sums, kColBlock<T>);
        else
          outer_tile<Lane, 4>(small, lds, wide(c), depth, sums, kColBlock<T>);
      }
    }
  }

  const TallPack<Lane>& small_;
  alignas(64) Lane stage_[kRowChunk * kColBlock<T>];
  Buffer<float> sums_;
};

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
