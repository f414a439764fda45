// Norms of the rows or columns of wide + s * up down, and the two products of wide that their gradients are made of.
// The sum lives in registers, one tile at a time. This file includes itself once per instruction set (foreach_isa.h).
#ifndef PEFTKERN_ISA

#include "check.h"

namespace peftkern {

// wide [P, Q] of any dtype; up [P, R], down [R, Q] and the rest f32.
struct WeightNorm {
  int64_t p, q, r;
  Matrix wide, up, down;
  float scale;
  bool by_row;
  float* norm;  // [P] or [Q]
  Matrix left, right;
};

}  // namespace peftkern

#define PEFTKERN_ISA_FILE "weight_norm.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

WeightNorm weight_norm_args(const CpuCheck& check, const Tensor& wide, const Tensor& up, const Tensor& down) {
  check.dims("wide", wide, 2);
  check.dims("up", up, 2);
  WeightNorm op{};
  op.p = wide.size(0), op.q = wide.size(1), op.r = up.size(1);
  check.positive("P", op.p), check.positive("Q", op.q), check.positive("R", op.r);
  check.shape("wide", wide, {op.p, op.q}, true);
  check.shape("up", up, {op.p, op.r});
  check.shape("down", down, {op.r, op.q});
  check.dtype("up", up, ScalarType::Float);
  check.dtype("down", down, ScalarType::Float);
  op.wide = check.matrix("wide", wide), op.up = check.matrix("up", up), op.down = check.matrix("down", down);
  return op;
}

Tensor weight_norm_forward(const Tensor& wide, const Tensor& up, const Tensor& down, double scale, bool by_row) {
  WeightNorm op = weight_norm_args(CpuCheck("weight_norm_forward"), wide, up, down);
  op.scale = static_cast<float>(scale), op.by_row = by_row;
  Tensor norm = empty_f32(wide, {by_row ? op.p : op.q});
  op.norm = static_cast<float*>(norm.mutable_data_ptr());
  PEFTKERN_CALL(weight_norm_forward, op);
  return norm;
}

std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& wide, const Tensor& up, const Tensor& down) {
  WeightNorm op = weight_norm_args(CpuCheck("weight_norm_backward"), wide, up, down);
  Tensor left = empty_f32(wide, {op.p, op.r}), right = empty_f32(wide, {op.r, op.q});
  op.left = f32_matrix(left), op.right = f32_matrix(right);
  PEFTKERN_CALL(weight_norm_backward, op);
  return {left, right};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def("weight_norm_forward(Tensor wide, Tensor up, Tensor down, float scale, bool by_row) -> Tensor");
  m.def("weight_norm_backward(Tensor wide, Tensor up, Tensor down) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("weight_norm_forward", TORCH_BOX(&peftkern::weight_norm_forward));
  m.impl("weight_norm_backward", TORCH_BOX(&peftkern::weight_norm_backward));
}

#else  // once per instruction set

#include "simd.h"
#include "skinny.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int kNormRows = 4;        // rows of a tile: its sums and squares fit the registers
constexpr int64_t kPanelRun = 16;   // panels whose squares are summed in one chain
constexpr int64_t kPartRows = 256;  // rows whose squares are summed apart, by columns

// acc = rows [m, m + kNormRows) of one panel of wide + s * up down; rows past the end repeat the last one.
template <class T>
PEFTKERN_INLINE void sum_tile(const WeightNorm& op, const float* lanes, const PanelPack<float>& down, int64_t m,
                              int64_t rows, int64_t panel, vf (&acc)[kNormRows][kTileVecs]) {
  const int64_t c0 = panel * kPanel;
  const float* pointers[kNormRows];
#pragma GCC unroll 8
  for (int i = 0; i < kNormRows; ++i) {
    const int64_t row = i < rows ? i : rows - 1;
    pointers[i] = lanes + row * down.depth;
    __builtin_prefetch(op.wide.as<const T>() + (m + row) * op.wide.row + c0 + 4 * kPanel, 0, 2);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] = vf{};
  }
  tile<float, kNormRows>(pointers, 1, Packed<float>{down.at(panel), kPanel}, down.depth, acc);
  // Last: every one of many small terms added to a large weight would be rounded at the weight's size.
#pragma GCC unroll 8
  for (int i = 0; i < kNormRows; ++i) {
    const T* wide = op.wide.as<const T>() + (m + (i < rows ? i : rows - 1)) * op.wide.row;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) acc[i][v] += load_columns(wide, c0 + v * kLanes, op.q);
  }
}

// A tile of rows: lanes are scale * up [rows, depth].
template <class T>
void row_norms(const WeightNorm& op, const float* lanes, const PanelPack<float>& down, int64_t m, int64_t rows) {
  vf total[kNormRows] = {};
  for (int64_t first = 0; first < down.panels; first += kPanelRun) {
    vf squares[kNormRows] = {};
    for (int64_t panel = first; panel < first + kPanelRun && panel < down.panels; ++panel) {
      vf acc[kNormRows][kTileVecs];
      sum_tile<T>(op, lanes, down, m, rows, panel, acc);
#pragma GCC unroll 8
      for (int i = 0; i < kNormRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kTileVecs; ++v) squares[i] += acc[i][v] * acc[i][v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kNormRows; ++i) total[i] += squares[i];
  }
  const v4 sums = sum4(total[0], total[1], total[2], total[3]);
  for (int64_t i = 0; i < rows; ++i) op.norm[m + i] = std::sqrt(sums[i]);
}

template <class T>
void by_row(const WeightNorm& op, const PanelPack<float>& down) {
  for_tasks(ceil_div(op.p, kRowChunk), kRowChunk * op.r * op.q, [&](int64_t begin, int64_t end) {
    Buffer<float> lanes(kRowChunk * down.depth);
    for_chunks(op.p, begin, end, [&](int64_t m0, int64_t rows) {
      lanes_along_r(op.up.as<const float>() + m0 * op.r, rows, op.r, op.scale, down.depth, lanes.get());
      for (int64_t i = 0; i < rows; i += kNormRows)
        row_norms<T>(op, lanes.get() + i * down.depth, down, m0 + i, rows - i < kNormRows ? rows - i : kNormRows);
    });
  });
}

template <class T>
void by_column(const WeightNorm& op, const PanelPack<float>& down) {
  const int64_t parts = ceil_div(op.p, kPartRows), width = down.panels * kPanel;
  Buffer<float> sums(parts * width);
  for_tasks(parts, kPartRows * op.r * op.q, [&](int64_t begin, int64_t end) {
    Buffer<float> lanes(kPartRows * down.depth);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t m0 = part * kPartRows, rows = op.p - m0 < kPartRows ? op.p - m0 : kPartRows;
      float* to = sums.get() + part * width;
      std::memset(to, 0, static_cast<size_t>(width) * sizeof(float));
      lanes_along_r(op.up.as<const float>() + m0 * op.r, rows, op.r, op.scale, down.depth, lanes.get());
      for (int64_t i = 0; i < rows; i += kNormRows)
        for (int64_t panel = 0; panel < down.panels; ++panel) {
          vf acc[kNormRows][kTileVecs];
          sum_tile<T>(op, lanes.get() + i * down.depth, down, m0 + i, rows - i < kNormRows ? rows - i : kNormRows,
                      panel, acc);
#pragma GCC unroll 8
          for (int v = 0; v < kTileVecs; ++v) {
            vf squares = acc[0][v] * acc[0][v];
#pragma GCC unroll 8
            for (int j = 1; j < kNormRows; ++j)
              if (i + j < rows) squares += acc[j][v] * acc[j][v];
            float* at = to + panel * kPanel + v * kLanes;
            store(at, load(at) + squares);
          }
        }
    }
  });
  for (int64_t c = 0; c < op.q; ++c) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += sums.get()[part * width + c];
    op.norm[c] = std::sqrt(sum);
  }
}

// left = wide down^T
template <class T>
void times_down(const WeightNorm& op) {
  const DotPack<float> down(op.r, op.q);
  pack_dot(down, op.down, op.q);
  for_tasks(ceil_div(op.p, kRowChunk), kRowChunk * op.r * op.q, [&](int64_t begin, int64_t end) {
    for_chunks(op.p, begin, end, [&](int64_t m, int64_t rows) {
      shrink<float, T>(op.wide.as<const T>() + m * op.wide.row, op.wide.row, rows, op.p - m - rows, op.q, nullptr, 0,
                       down, 1.0f, op.left.as<float>() + m * op.r, op.r);
    });
  });
}

// right = up^T wide
template <class T>
void times_up(const WeightNorm& op) {
  TallPack<float> up(op.p, op.r, false);
  up.fill(op.up.as<const float>(), op.r, op.r, 0, op.p);
  constexpr int64_t kBlock = kColBlock<T>;
  for_tasks(ceil_div(op.q, kBlock), op.p * kBlock * op.r, [&](int64_t begin, int64_t end) {
    for (int64_t c0 = begin * kBlock; c0 < end * kBlock; c0 += kBlock) {
      Outer<float, T> outer(up);
      for_chunks(op.p, [&](int64_t m, int64_t rows) {
        outer.add(op.wide.as<const T>(), op.wide.row, m, rows, c0, op.q, nullptr, 0);
      });
      outer.write(0, op.r, c0, op.q, 1.0f, op.right);
    }
  });
}

}  // namespace

void weight_norm_forward(const WeightNorm& op) {
  const PanelPack<float> down(op.r, op.q);
  pack_panel(down, op.down, op.r, op.q);
  with_dtype(op.wide.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    op.by_row ? by_row<T>(op, down) : by_column<T>(op, down);
  });
}

void weight_norm_backward(const WeightNorm& op) {
  with_dtype(op.wide.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    times_down<T>(op);
    times_up<T>(op);
  });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
