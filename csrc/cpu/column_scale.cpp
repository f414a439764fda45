// y = x * s by columns, and its gradients in one reading of x and dy. This file includes itself once per instruction
// set (foreach_isa.h).
#ifndef PEFTKERN_ISA

#include "check.h"

namespace peftkern {

// x, dy, y and dx are [M, C] of one dtype, s [C] f32; ds f32. What is absent has no data.
struct ColumnScale {
  int64_t m, c;
  Matrix x, dy, out;  // out is y, or dx
  const float* s;
  float* ds;
};

}  // namespace peftkern

#define PEFTKERN_ISA_FILE "column_scale.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

// s in f32: itself, or converted into `buffer`.
const float* scale_values(const CpuCheck& check, const Tensor& s, int64_t c, Buffer<float>& buffer) {
  check.shape("s", s, {c});
  const Dtype type = check.floating("s", s);
  if (type == Dtype::f32) return s.const_data_ptr<float>();
  with_dtype(type, [&](auto* t) {
    const auto* from = static_cast<decltype(t)>(const_cast<void*>(s.const_data_ptr()));
    for (int64_t i = 0; i < c; ++i) buffer.get()[i] = to_float(from[i]);
  });
  return buffer.get();
}

void column_scale_forward(const Tensor& x, const Tensor& s, const Tensor& y) {
  const CpuCheck check("column_scale_forward");
  check.dims("x", x, 2);
  ColumnScale op{};
  op.m = x.size(0), op.c = x.size(1);
  check.positive("M", op.m), check.positive("C", op.c);
  check.shape("x", x, {op.m, op.c}, true);
  check.shape("y", y, {op.m, op.c});
  check.dtype("y", y, x.scalar_type());
  Buffer<float> buffer(op.c);
  op.s = scale_values(check, s, op.c, buffer);
  op.x = check.matrix("x", x), op.out = check.matrix("y", y);
  PEFTKERN_CALL(column_scale_forward, op);
}

std::tuple<Tensor, Tensor> column_scale_backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& s,
                                                 bool need_dx) {
  const CpuCheck check("column_scale_backward");
  check.dims("dy", dy, 2);
  ColumnScale op{};
  op.m = dy.size(0), op.c = dy.size(1);
  check.positive("M", op.m), check.positive("C", op.c);
  check.shape("dy", dy, {op.m, op.c}, true);
  check.that(x.has_value() || need_dx, "x is None and need_dx false: want one of the gradients");
  Buffer<float> buffer(op.c);
  op.s = scale_values(check, s, op.c, buffer);
  op.dy = check.matrix("dy", dy);
  if (x.has_value()) {
    check.shape("x", *x, {op.m, op.c}, true);
    check.dtype("x", *x, dy.scalar_type());
    op.x = check.matrix("x", *x);
  }
  Tensor dx = need_dx ? empty(dy, {op.m, op.c}) : empty(dy, {0});
  Tensor ds = empty_f32(dy, {x.has_value() ? op.c : 0});
  if (need_dx) op.out = check.matrix("dx", dx);
  if (x.has_value()) op.ds = ds.mutable_data_ptr<float>();
  PEFTKERN_CALL(column_scale_backward, op);
  return {dx, ds};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def("column_scale_forward(Tensor x, Tensor s, Tensor(a!) y) -> ()");
  m.def("column_scale_backward(Tensor dy, Tensor? x, Tensor s, bool need_dx) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("column_scale_forward", TORCH_BOX(&peftkern::column_scale_forward));
  m.impl("column_scale_backward", TORCH_BOX(&peftkern::column_scale_backward));
}

#else  // once per instruction set

#include "simd.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

// Tiles are cut by shape alone, so that sums do not depend on the number of threads: whole rows, which is what hardware
// prefetches best, and enough of them for the partial sums to weigh next to nothing. Few rows are cut by columns too.
constexpr int64_t kTileColumns = 2048;
constexpr int64_t kTileRows = 64;
constexpr int64_t kFewRowTiles = 8;
constexpr int64_t kMostRowTiles = 64;

struct Tiling {
  int64_t rows, row_tiles, columns, column_tiles;
  explicit Tiling(const ColumnScale& op)
      : rows(op.m <= kTileRows * kMostRowTiles ? kTileRows : ceil_div(op.m, kMostRowTiles)),
        row_tiles(ceil_div(op.m, rows)),
        columns(row_tiles > kFewRowTiles || op.c < kTileColumns ? op.c : kTileColumns),
        column_tiles(ceil_div(op.c, columns)) {}
};

// f(first row, end row, first column, end column, row tile) for every tile, in parallel.
template <class F>
void for_tiles(const ColumnScale& op, const F& f) {
  const Tiling by(op);
  for_tasks(by.row_tiles * by.column_tiles, by.rows * by.columns, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / by.column_tiles, m = i * by.rows, c = t % by.column_tiles * by.columns;
      f(m, m + by.rows < op.m ? m + by.rows : op.m, c, c + by.columns < op.c ? c + by.columns : op.c, i);
    }
  });
}

// kLanes elements, or with PART the 0 < n < kLanes that are left of a row.
template <bool PART, class T>
PEFTKERN_INLINE vf take(const T* p, int64_t n) {
  if constexpr (PART) return load_part(p, n);
  return load(p);
}
template <bool PART, class T>
PEFTKERN_INLINE void put(T* p, vf v, int64_t n) {
  if constexpr (PART)
    store_part(p, v, n);
  else
    store(p, v);
}

template <class T>
PEFTKERN_INLINE void scale_row(const T* x, const float* s, int64_t n, T* y) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) put<false>(y + c, take<false>(x + c, 0) * take<false>(s + c, 0), 0);
  if (c < n) put<true>(y + c, take<true>(x + c, n - c) * take<true>(s + c, n - c), n - c);
}

template <class T>
void forward(const ColumnScale& op) {
  for_tiles(op, [&](int64_t m, int64_t m_end, int64_t c, int64_t c_end, int64_t) {
    for (; m < m_end; ++m)
      scale_row(op.x.as<const T>() + m * op.x.row + c, op.s + c, c_end - c, op.out.as<T>() + m * op.out.row + c);
  });
}

// One or (TWO) two rows of a tile; strides in elements.
template <class T>
struct Rows {
  const T *dy, *x;
  const float* s;
  T* dx;
  float* sums;
  int64_t dy_row, x_row, dx_row;
};

// sums += dy * x and (DX) dx = dy * s.
template <bool DX, bool TWO, bool PART, class T>
PEFTKERN_INLINE void backward_lanes(const Rows<T>& r, int64_t c, int64_t n) {
  const vf d0 = take<PART>(r.dy + c, n);
  vf product = d0 * take<PART>(r.x + c, n), d1{};
  if constexpr (TWO) {
    d1 = take<PART>(r.dy + r.dy_row + c, n);
    product += d1 * take<PART>(r.x + r.x_row + c, n);
  }
  // Both rows at once: one rounding at the size of the sum instead of two.
  put<PART>(r.sums + c, take<PART>(r.sums + c, n) + product, n);
  if constexpr (DX) {
    const vf s = take<PART>(r.s + c, n);
    put<PART>(r.dx + c, d0 * s, n);
    if constexpr (TWO) put<PART>(r.dx + r.dx_row + c, d1 * s, n);
  }
}

template <bool DX, bool TWO, class T>
PEFTKERN_INLINE void backward_rows(const Rows<T>& r, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) backward_lanes<DX, TWO, false>(r, c, 0);
  if (c < n) backward_lanes<DX, TWO, true>(r, c, n - c);
}

template <bool DX, class T>
void backward_tile(const ColumnScale& op, int64_t m, int64_t m_end, int64_t c, int64_t c_end, float* sums) {
  const int64_t n = c_end - c;
  for (int64_t i = 0; i < n; ++i) sums[c + i] = 0.0f;
  for (; m < m_end; m += 2) {
    const Rows<T> rows{op.dy.as<const T>() + m * op.dy.row + c,
                       op.x.as<const T>() + m * op.x.row + c,
                       op.s + c,
                       DX ? op.out.as<T>() + m * op.out.row + c : nullptr,
                       sums + c,
                       op.dy.row,
                       op.x.row,
                       op.out.row};
    if (m + 1 < m_end)
      backward_rows<DX, true>(rows, n);
    else
      backward_rows<DX, false>(rows, n);
  }
}

template <class T>
void backward(const ColumnScale& op) {
  if (!op.ds) {
    ColumnScale only_dx = op;
    only_dx.x = op.dy;
    return forward<T>(only_dx);
  }
  const int64_t row_tiles = Tiling(op).row_tiles;
  Buffer<float> partial(row_tiles > 1 ? row_tiles * op.c : 0);
  for_tiles(op, [&](int64_t m, int64_t m_end, int64_t c, int64_t c_end, int64_t tile) {
    float* sums = row_tiles > 1 ? partial.get() + tile * op.c : op.ds;
    if (op.out.data)
      backward_tile<true, T>(op, m, m_end, c, c_end, sums);
    else
      backward_tile<false, T>(op, m, m_end, c, c_end, sums);
  });
  if (row_tiles == 1) return;
  for_tasks(ceil_div(op.c, kTileColumns), kTileColumns * row_tiles, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kTileColumns; c < end * kTileColumns && c < op.c; c += kLanes) {
      const int64_t left = op.c - c;
      vf sum{};
      for (int64_t i = 0; i < row_tiles; ++i) {
        const float* from = partial.get() + i * op.c + c;
        sum += left >= kLanes ? load(from) : load_part(from, left);
      }
      if (left >= kLanes)
        store(op.ds + c, sum);
      else
        store_part(op.ds + c, sum, left);
    }
  });
}

}  // namespace

void column_scale_forward(const ColumnScale& op) {
  with_dtype(op.x.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)> >(op); });
}

void column_scale_backward(const ColumnScale& op) {
  with_dtype(op.dy.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)> >(op); });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
