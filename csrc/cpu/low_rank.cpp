// y = c * (base + s * (drop(x) A^T) B^T) + shift and its gradients. This file includes itself once per instruction set
// (foreach_isa.h).
#ifndef PEFTKERN_ISA

#include "check.h"
#include "low_rank.h"

#define PEFTKERN_ISA_FILE "low_rank.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

// Checks what forward and backward share and fills in the sizes.
LowRank low_rank_args(const CpuCheck& check, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double p,
                      const std::optional<Tensor>& seed) {
  check.dims("x", x, 2);
  check.dims("a", a, 2);
  check.dims("b", b, 2);
  LowRank op{};
  op.m = x.size(0), op.k = x.size(1), op.n = b.size(0), op.r = a.size(0);
  check.positive("M", op.m), check.positive("K", op.k), check.positive("N", op.n), check.positive("R", op.r);
  check.shape("x", x, {op.m, op.k}, true);
  check.shape("a", a, {op.r, op.k});
  check.shape("b", b, {op.n, op.r});
  op.x = check.matrix("x", x), op.a = check.matrix("a", a), op.b = check.matrix("b", b);
  check.dtype("b", b, a.scalar_type());
  op.scale = static_cast<float>(scale);
  op.drop = check.dropout(p, seed);
  return op;
}

// Data of an f32 [N], or null.
float* f32_columns(const CpuCheck& check, const char* name, const std::optional<Tensor>& t, int64_t n) {
  if (!t.has_value()) return nullptr;
  check.shape(name, *t, {n});
  check.dtype(name, *t, ScalarType::Float);
  return static_cast<float*>(t->mutable_data_ptr());
}

void base_argument(const CpuCheck& check, LowRank& op, const Tensor& base, const Tensor& x) {
  check.shape("base", base, {op.m, op.n}, true);
  check.dtype("base", base, x.scalar_type());
  op.base = check.matrix("base", base);
}

Tensor low_rank_forward(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& y, double scale, double p,
                        const std::optional<Tensor>& seed, const std::optional<Tensor>& base,
                        const std::optional<Tensor>& column_scale, const std::optional<Tensor>& shift, bool fresh) {
  const CpuCheck check("low_rank_forward");
  LowRank op = low_rank_args(check, x, a, b, scale, p, seed);
  check.shape("y", y, {op.m, op.n});
  check.dtype("y", y, x.scalar_type());
  Tensor h = empty_f32(x, {op.m, op.r});
  op.y = check.matrix("y", y), op.h = f32_matrix(h);
  if (!fresh) op.base = op.y;
  if (base.has_value()) base_argument(check, op, *base, x);
  op.column_scale = f32_columns(check, "column_scale", column_scale, op.n);
  op.shift = f32_columns(check, "shift", shift, op.n);
  PEFTKERN_CALL(low_rank_forward, op);
  return h;
}

std::tuple<Tensor, Tensor> low_rank_backward(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b,
                                             const Tensor& h, const std::optional<Tensor>& dx, double scale, double p,
                                             const std::optional<Tensor>& seed, bool need_a, bool need_b,
                                             const std::optional<Tensor>& base, const std::optional<Tensor>& base_dot) {
  const CpuCheck check("low_rank_backward");
  LowRank op = low_rank_args(check, x, a, b, scale, p, seed);
  check.shape("dy", dy, {op.m, op.n}, true);
  check.dtype("dy", dy, x.scalar_type());
  check.shape("h", h, {op.m, op.r});
  check.dtype("h", h, ScalarType::Float);
  op.dy = check.matrix("dy", dy), op.h = f32_matrix(h);
  if (dx.has_value()) {
    check.shape("dx", *dx, {op.m, op.k});
    check.dtype("dx", *dx, x.scalar_type());
    op.dx = check.matrix("dx", *dx);
  }
  check.that(base.has_value() == base_dot.has_value() && (need_b || !base.has_value()),
             "base, base_dot and need_b go together");
  if (base.has_value()) base_argument(check, op, *base, x);
  op.base_dot = f32_columns(check, "base_dot", base_dot, op.n);
  Tensor da = need_a ? empty_f32(x, {op.r, op.k}) : empty_f32(x, {0});
  Tensor db = need_b ? empty_f32(x, {op.n, op.r}) : empty_f32(x, {0});
  if (need_a) op.da = f32_matrix(da);
  if (need_b) op.db = f32_matrix(db);
  PEFTKERN_CALL(low_rank_backward, op);
  return {da, db};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def(
      "low_rank_forward(Tensor x, Tensor a, Tensor b, Tensor(a!) y, float scale, float p, Tensor? seed, "
      "Tensor? base=None, Tensor? column_scale=None, Tensor? shift=None, bool fresh=False) -> Tensor");
  m.def(
      "low_rank_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor h, Tensor(a!)? dx, float scale, float p, "
      "Tensor? seed, bool need_a, bool need_b, Tensor? base=None, Tensor(b!)? base_dot=None) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("low_rank_forward", TORCH_BOX(&peftkern::low_rank_forward));
  m.impl("low_rank_backward", TORCH_BOX(&peftkern::low_rank_backward));
}

#else  // once per instruction set

#include "simd.h"
#include "skinny.h"
#include "few.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

// values[n] as expand reads them, with zeros up to whole panels behind, or null.
struct Columns {
  Buffer<float> data;
  const float* values;
  Columns(const float* from, int64_t n, int64_t panels)
      : data(from ? panels * kPanel : 0), values(from ? data.get() : nullptr) {
    for (int64_t i = 0; from && i < panels * kPanel; ++i) data.get()[i] = i < n ? from[i] : 0.0f;
  }
};

template <class Lane, class T>
void forward(const LowRank& op) {
  if (op.m <= kFewRows)
    return with_dtype(op.a.dtype, [&](auto* p) { few_rows<T, std::remove_pointer_t<decltype(p)> >(op); });
  const DotPack<Lane> a(op.r, op.k);
  const PanelPack<Lane> b(op.r, op.n);
  pack_dot(a, op.a, op.k);
  pack_panel(b, op.b.transposed(), op.r, op.n);
  const Columns scale(op.column_scale, op.n, b.panels), shift(op.shift, op.n, b.panels);
  const int64_t ldb = mask_stride(op.k);
  for_tasks(ceil_div(op.m, kRowChunk), kRowChunk * op.r * (op.k + op.n), [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> bits(op.drop.on ? kRowChunk * ldb + kMaskSlack : 0);
    Buffer<Lane> lanes(kRowChunk * b.depth);
    RowKey keys[kRowChunk];
    for_chunks(op.m, begin, end, [&](int64_t m, int64_t rows) {
      if (op.drop.on) {
        for (int64_t i = 0; i < rows; ++i) keys[i] = op.key(m + i);
        keep_bits(keys, rows, 0, op.k, op.drop.threshold, bits.get(), ldb);
      }
      float* h = op.h.as<float>() + m * op.r;
      shrink<Lane, T>(op.x.as<const T>() + m * op.x.row, op.x.row, rows, op.m - m - rows, op.k,
                      op.drop.on ? bits.get() : nullptr, ldb, a, op.drop.inverse_keep, h, op.r);
      T* y = op.y.as<T>() + m * op.y.row;
      lanes_along_r(h, rows, op.r, op.scale, b.depth, lanes.get());
      const T* base = op.base.data ? op.base.as<const T>() + m * op.base.row : nullptr;
      const ExpandTo<T> to{y, op.y.row, base, op.base.row, shift.values, nullptr, 0, 0, scale.values};
      expand(lanes.get(), rows, b, 0, b.panels, op.n, to);
    });
  });
}

// What the rows of backward leave for its columns.
template <class Lane>
struct Half {
  TallPack<Lane> h, dh;
  PanelPack<Lane> a;
  Buffer<Lane> lanes;  // of dh, as expand reads them
  Buffer<RowKey> keys;
  explicit Half(const LowRank& op)
      : h(op.m, op.r, false),
        dh(op.m, op.r, false),
        a(op.r, op.k),
        lanes(op.m * a.depth),
        keys(op.drop.on ? op.m : 0) {}
};

// dh = s * dy b
template <class Lane, class T>
void backward_rows(const LowRank& op, const Half<Lane>& half) {
  const bool through_b = op.da.data || op.dx.data;
  const DotPack<Lane> b(op.r, op.n);
  if (through_b) pack_dot(b, op.b.transposed(), op.n);
  if (op.dx.data) pack_panel(half.a, op.a, op.r, op.k);
  for_tasks(ceil_div(op.m, kRowChunk), kRowChunk * op.r * (through_b ? op.n : 1), [&](int64_t begin, int64_t end) {
    Buffer<float> dh(kRowChunk * op.r);
    for_chunks(op.m, begin, end, [&](int64_t m, int64_t rows) {
      if (op.db.data) half.h.fill(op.h.as<float>() + m * op.r, op.r, op.r, m, m + rows);
      if (!through_b) return;
      if (op.drop.on)
        for (int64_t i = 0; i < rows; ++i) half.keys.get()[m + i] = op.key(m + i);
      shrink<Lane, T>(op.dy.as<const T>() + m * op.dy.row, op.dy.row, rows, op.m - m - rows, op.n, nullptr, 0, b,
                      op.scale, dh.get(), op.r);
      half.dh.fill(dh.get(), op.r, op.r, m, m + rows);
      if (op.dx.data)
        lanes_along_r(dh.get(), rows, op.r, op.drop.inverse_keep, half.a.depth, half.lanes.get() + m * half.a.depth);
    });
  });
}

// db[n, :] = s * dy^T h and base_dot[n] = sum over m of dy * base, for one block of columns of dy.
template <class Lane, class T>
void backward_dy_block(const LowRank& op, const Half<Lane>& half, int64_t c0) {
  constexpr int64_t kBlock = kColBlock<T>;
  Outer<Lane, T> outer(half.h);
  float dots[kBlock] = {};
  for_chunks(op.m, [&](int64_t m, int64_t rows) {
    outer.add(op.dy.as<const T>(), op.dy.row, m, rows, c0, op.n, nullptr, 0);
    if (op.base_dot)
      column_dots(op.dy.as<const T>() + m * op.dy.row + c0, op.dy.row, op.base.as<const T>() + m * op.base.row + c0,
                  op.base.row, rows, op.n - c0, dots);
  });
  outer.write(0, op.r, c0, op.n, op.scale, op.db.transposed());
  if (op.base_dot)
    for (int64_t i = 0; i < kBlock && c0 + i < op.n; ++i) op.base_dot[c0 + i] = dots[i];
}

// da = dh^T drop(x) and dx += drop(dh a) for one block of columns of x, which share the dropout mask.
template <class Lane, class T>
void backward_x_block(const LowRank& op, const Half<Lane>& half, int64_t c0) {
  constexpr int64_t kBlock = kColBlock<T>, kPanels = kBlock / kPanel;
  const PanelPack<Lane>& a = half.a;
  const int64_t ldb = mask_stride(kBlock), panel = c0 / kPanel;
  const int64_t panels = panel + kPanels < a.panels ? panel + kPanels : a.panels;
  Outer<Lane, T> outer(half.dh);
  Buffer<uint8_t> mask(kRowChunk * ldb + kMaskSlack);
  const uint8_t* bits = op.drop.on ? mask.get() : nullptr;
  for_chunks(op.m, [&](int64_t m, int64_t rows) {
    if (op.drop.on) keep_bits(half.keys.get() + m, rows, c0, kBlock, op.drop.threshold, mask.get(), ldb);
    if (op.da.data) outer.add(op.x.as<const T>(), op.x.row, m, rows, c0, op.k, bits, ldb);
    if (op.dx.data) {
      T* dx = op.dx.as<T>() + m * op.dx.row;
      const ExpandTo<T> to{dx, op.dx.row, dx, op.dx.row, nullptr, bits, ldb, c0};
      expand(half.lanes.get() + m * a.depth, rows, a, panel, panels, op.k, to);
    }
  });
  if (op.da.data) outer.write(0, op.r, c0, op.k, op.drop.inverse_keep, op.da);
}

template <class Lane, class T>
void backward(const LowRank& op) {
  constexpr int64_t kBlock = kColBlock<T>;
  const Half<Lane> half(op);
  backward_rows<Lane, T>(op, half);
  for_tasks_of_two(
      op.da.data || op.dx.data ? ceil_div(op.k, kBlock) : 0, op.db.data ? ceil_div(op.n, kBlock) : 0,
      op.m * kBlock * op.r * 2, [&](int64_t i) { backward_x_block<Lane, T>(op, half, i * kBlock); },
      [&](int64_t i) { backward_dy_block<Lane, T>(op, half, i * kBlock); });
}

}  // namespace

void low_rank_forward(const LowRank& op) {
  with_lane(op.x.dtype, op.a.dtype,
            [&](auto lane, auto* t) { forward<decltype(lane), std::remove_pointer_t<decltype(t)> >(op); });
}

void low_rank_backward(const LowRank& op) {
  with_lane(op.x.dtype, op.a.dtype,
            [&](auto lane, auto* t) { backward<decltype(lane), std::remove_pointer_t<decltype(t)> >(op); });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
