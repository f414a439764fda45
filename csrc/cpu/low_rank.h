// The problem that low_rank.cpp solves, for ops that are made of several of them.
#pragma once

#include "common.h"

namespace peftkern {

// x, base, y, dy and dx are [M, K or N] of one dtype, a [R, K] and b [N, R] of another; h, da and db are f32.
struct LowRank {
  int64_t m, k, n, r;
  Matrix x, a, b, base, y, h, dy, dx, da, db;  // an absent one has no data
  const float* column_scale;                   // c and shift: f32 [N] or null
  const float* shift;
  float* base_dot;  // [N]: column sums of dy * base, or null
  float scale;
  Dropout drop;
  const int64_t* ids;  // [M]: the row numbers that dropout draws by; null for 0, 1, ...
  RowKey key(int64_t m) const { return row_key(drop.seed, ids ? ids[m] : m); }
};

}  // namespace peftkern
