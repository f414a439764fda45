// out[M, R] = scale * drop(wide[M, C]) small[R, C]^T. Part of skinny.h, read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

// small[R, C] for shrink: blocks of kDotCols rows; in a block, for every vector of C, that vector of each row.
// Zeros fill up the last block's rows to a multiple of 4 and the last vector.
template <class Lane>
struct DotPack {
  static constexpr int64_t kStep = kLanes * kPerLane<Lane>;  // elements of C in a vector
  int64_t rows, steps;
  Buffer<Lane> data;
  DotPack(int64_t r, int64_t c) : rows(r), steps(ceil_div(c, kStep)), data(round_up(r, 4) * steps * kLanes) {}
  static int width(int64_t left) { return left > 4 ? kDotCols : 4; }
  // First lane of the block that starts at row r0, at vector s.
  const Lane* at(int64_t r0, int64_t s) const {
    return data.get() + r0 * steps * kLanes + s * kLanes * width(rows - r0);
  }
};

template <class Lane, class P>
void pack_dot_rows(const DotPack<Lane>& pack, const Matrix& small, int64_t cols, int64_t begin, int64_t end) {
  using Element = std::conditional_t<kPerLane<Lane> == 2, Bf16, float>;
  constexpr int64_t kStep = DotPack<Lane>::kStep;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t r0 = r / kDotCols * kDotCols, inside = r < pack.rows ? cols : 0;
    const P* from = small.as<const P>() + r * small.row;
    for (int64_t s = 0; s < pack.steps; ++s) {
      Lane* to = const_cast<Lane*>(pack.at(r0, s)) + (r - r0) * kLanes;
      const int64_t c = s * kStep, n = inside - c < kStep ? inside - c : kStep;
      pack_line(from + c * small.col, small.col, n > 0 ? n : 0, kStep, reinterpret_cast<Element*>(to));
    }
  }
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

// out[ROWS][COLS] (+)= scale * x[ROWS, c0 : c1] . packed rows. Meanwhile AHEAD rows from `ahead` on come into the
// cache.
template <class Lane, class T, class A, int ROWS, int COLS, bool MASKED, int AHEAD>
void dot_tile(const T* x, int64_t ldx, const A* ahead, int64_t lda, const uint8_t* bits, int64_t ldb,
              const Lane* packed, int64_t c0, int64_t c1, float scale, bool add, float* out, int64_t ldo,
              int64_t cols) {
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
    for (int i = 0; i < AHEAD; ++i) __builtin_prefetch(ahead + i * lda + c, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      xs[i] = wide_lanes<Lane>(x + i * ldx + c);
      if constexpr (MASKED) xs[i] = keep_lanes<Lane>(xs[i], bits + i * ldb, c);
    }
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) {
      const vf a = in_register(load_lanes(packed + j * kLanes));
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) acc[i][j] = mac<Lane>(acc[i][j], xs[i], a);
    }
    packed += COLS * kLanes;
  }
  if (c < c1) {
#pragma GCC unroll 8
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
      v4 sums = sum4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]) * scale;
      float* to = out + i * ldo + j;
      if (j + 4 <= cols) {
        if (add) sums += load_as<v4>(to);
        __builtin_memcpy(to, &sums, sizeof sums);
      } else {
        for (int k = 0; j + k < cols; ++k) to[k] = add ? to[k] + sums[k] : sums[k];
      }
    }
  }
}

template <class Lane, class T, class A, int ROWS, int COLS, bool MASKED, int AHEAD>
void dot_rows(const T* x, int64_t ldx, int64_t rows, const A* ahead, int64_t lda, const uint8_t* bits, int64_t ldb,
              const Lane* packed, int64_t c0, int64_t c1, float scale, bool add, float* out, int64_t ldo,
              int64_t cols) {
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    dot_tile<Lane, T, A, ROWS, COLS, MASKED, AHEAD>(x + m * ldx, ldx, ahead + m * lda, lda, bits + m * ldb, ldb, packed,
                                                    c0, c1, scale, add, out + m * ldo, ldo, cols);
  for (; m < rows; ++m)
    dot_tile<Lane, T, A, 1, COLS, MASKED, 1>(x + m * ldx, ldx, ahead + m * lda, lda, bits + m * ldb, ldb, packed, c0,
                                             c1, scale, add, out + m * ldo, ldo, cols);
}

// out[rows, R] (+)= scale * drop(x[:, c0 : c1]) small^T, whose vectors of these columns start at s0.
template <class Lane, class T, class A, int ROWS, bool MASKED>
void dot_blocks(const T* x, int64_t ldx, int64_t rows, const A* next, int64_t lda, const uint8_t* bits, int64_t ldb,
                const DotPack<Lane>& small, int64_t s0, int64_t c0, int64_t c1, float scale, float* out, int64_t ldo) {
  const bool few = small.rows <= 2 * kDotCols;
  for (int64_t r0 = 0; r0 < small.rows; r0 += kDotCols) {
    const int64_t left = small.rows - r0, turn = few ? 0 : r0 / kDotCols % ROWS;
    auto run = [&](auto* f) {
      f(x, ldx, rows, next + turn * lda, lda, bits, ldb, small.at(r0, s0), c0, c1, scale, s0 > 0, out + r0, ldo, left);
    };
    if (DotPack<Lane>::width(left) != kDotCols)
      run(dot_rows<Lane, T, A, ROWS, 4, MASKED, 1>);
    else if (few)
      run(dot_rows<Lane, T, A, ROWS, kDotCols, MASKED, ROWS>);
    else
      run(dot_rows<Lane, T, A, ROWS, kDotCols, MASKED, 1>);
  }
}

// out[M, R] = scale * drop(x[M, C]) small^T for `rows` of the rows. `more` rows of x are read next: they are fetched
// early, because the first block of R waits for memory and the others do not.
template <class Lane, class T, bool MASKED>
void shrink_rows(const T* x, int64_t ldx, int64_t rows, int64_t more, int64_t cols, const uint8_t* bits, int64_t ldb,
                 const DotPack<Lane>& small, float scale, float* out, int64_t ldo) {
  constexpr int64_t kStep = DotPack<Lane>::kStep;
  constexpr int64_t kMost = kDotBytes / (kLanes * 4);  // vectors
  const int64_t blocks = ceil_div(small.steps, kMost), per_block = ceil_div(small.steps, blocks);
  const bool staged = small.rows > kUnstagedDots;
  Buffer<float> stage(staged ? rows * per_block * kLanes : 0);
  const T* following = more > 0 ? x + rows * ldx : x;
  for (int64_t s0 = 0; s0 < small.steps; s0 += per_block) {
    const int64_t c0 = s0 * kStep;
    const int64_t c1 = (s0 + per_block) * kStep < cols ? (s0 + per_block) * kStep : cols;
    if constexpr (kPerLane<Lane> == 1) {
      if (staged) {
        const int64_t width = round_up(c1 - c0, kLanes);
        for (int64_t m = 0; m < rows; ++m)
          stage_line<MASKED>(x + m * ldx, c0, c1, c1, bits + m * ldb, stage.get() + m * width);
        dot_blocks<Lane, float, T, kStagedDotRows, false>(stage.get(), width, rows, c1 < cols ? x + c1 : following, ldx,
                                                          nullptr, 0, small, s0, 0, width, scale, out, ldo);
        continue;
      }
    }
    dot_blocks<Lane, T, T, kDotRows, MASKED>(x, ldx, rows, following, ldx, bits, ldb, small, s0, c0, c1, scale, out,
                                             ldo);
  }
}

// The same; bits may be null: no dropout.
template <class Lane, class T>
void shrink(const T* x, int64_t ldx, int64_t rows, int64_t more, int64_t cols, const uint8_t* bits, int64_t ldb,
            const DotPack<Lane>& small, float scale, float* out, int64_t ldo) {
  auto* run = bits ? shrink_rows<Lane, T, true> : shrink_rows<Lane, T, false>;
  run(x, ldx, rows, more, cols, bits, ldb, small, scale, out, ldo);
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
