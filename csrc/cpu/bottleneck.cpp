// y = residual + drop(s * (act(x D^T + b_d) U^T + b_u)) and its gradients. This file includes itself once per
// instruction set (foreach_isa.h).
#ifndef PEFTKERN_ISA

#include <vector>

#include "check.h"

namespace peftkern {

enum class Activation : int { relu, gelu, silu, tanh };

// x, dx [M, K] and y, dy, residual [M, N] of one dtype; down [R, K], up [N, R] and all their gradients of another; pre
// f32. Absent tensors have no data.
struct Bottleneck {
  int64_t m, k, n, r;
  Matrix x, down, up, residual, y, pre, dy, dx, d_down, d_up, d_down_bias, d_up_bias;
  std::vector<float> down_bias, up_bias;  // f32, empty if absent; up_bias padded with zeros
  Activation act;
  float scale;
  bool add_dy;
  Dropout drop;
};

constexpr int64_t kBiasPadding = 64;

}  // namespace peftkern

#define PEFTKERN_ISA_FILE "bottleneck.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

// A string argument. The header's own conversion to std::string loses the heap string that it copies from.
struct Name {
  char text[16];
};

Activation activation(const CpuCheck& check, const char* name) {
  constexpr const char* kNames[] = {"relu", "gelu", "silu", "tanh"};
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Activation>(i);
  check.that(false, "act is '", name, "', want relu, gelu, silu or tanh");
  return Activation::relu;
}

Bottleneck bottleneck_args(const CpuCheck& check, const Tensor& x, const Tensor& down, const Tensor& up,
                           const Name& act, double scale, double p, const std::optional<Tensor>& seed) {
  check.dims("x", x, 2);
  check.dims("down", down, 2);
  check.dims("up", up, 2);
  Bottleneck op{};
  op.m = x.size(0), op.k = x.size(1), op.n = up.size(0), op.r = down.size(0);
  check.positive("M", op.m), check.positive("K", op.k), check.positive("N", op.n), check.positive("R", op.r);
  check.shape("x", x, {op.m, op.k}, true);
  check.shape("down", down, {op.r, op.k});
  check.shape("up", up, {op.n, op.r});
  op.x = check.matrix("x", x), op.down = check.matrix("down", down), op.up = check.matrix("up", up);
  check.dtype("up", up, down.scalar_type());
  op.act = activation(check, act.text);
  op.scale = static_cast<float>(scale);
  op.drop = check.dropout(p, seed);
  return op;
}

std::vector<float> bias_values(const CpuCheck& check, const char* name, const std::optional<Tensor>& bias, int64_t n,
                               int64_t padding) {
  std::vector<float> values;
  if (!bias.has_value()) return values;
  check.shape(name, *bias, {n});
  values.assign(static_cast<size_t>(n + padding), 0.0f);
  const Dtype type = check.floating(name, *bias);
  const void* data = bias->const_data_ptr();
  for (int64_t i = 0; i < n; ++i)
    values[static_cast<size_t>(i)] = type == Dtype::f32    ? static_cast<const float*>(data)[i]
                                     : type == Dtype::bf16 ? to_float(static_cast<const Bf16*>(data)[i])
                                                           : to_float(static_cast<const F16*>(data)[i]);
  return values;
}

std::tuple<Tensor, Tensor> bottleneck_forward(const Tensor& x, const Tensor& down,
                                              const std::optional<Tensor>& down_bias, const Tensor& up,
                                              const std::optional<Tensor>& up_bias,
                                              const std::optional<Tensor>& residual, Name act, double scale, double p,
                                              const std::optional<Tensor>& seed) {
  const CpuCheck check("bottleneck_forward");
  Bottleneck op = bottleneck_args(check, x, down, up, act, scale, p, seed);
  op.down_bias = bias_values(check, "down_bias", down_bias, op.r, 0);
  op.up_bias = bias_values(check, "up_bias", up_bias, op.n, kBiasPadding);
  if (residual.has_value()) {
    check.shape("residual", *residual, {op.m, op.n}, true);
    check.dtype("residual", *residual, x.scalar_type());
    op.residual = check.matrix("residual", *residual);
  }
  Tensor y = empty(x, {op.m, op.n});
  Tensor pre = empty_f32(x, {op.m, op.r});
  op.y = check.matrix("y", y), op.pre = f32_matrix(pre);
  PEFTKERN_CALL(bottleneck_forward, op);
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(const Tensor& dy, const Tensor& x,
                                                                       const Tensor& pre, const Tensor& down,
                                                                       const Tensor& up, Name act, double scale,
                                                                       double p, const std::optional<Tensor>& seed,
                                                                       bool add_dy, bool need_dx) {
  const CpuCheck check("bottleneck_backward");
  Bottleneck op = bottleneck_args(check, x, down, up, act, scale, p, seed);
  check.shape("dy", dy, {op.m, op.n}, true);
  check.dtype("dy", dy, x.scalar_type());
  check.shape("pre", pre, {op.m, op.r});
  check.dtype("pre", pre, ScalarType::Float);
  check.that(!add_dy || op.n == op.k, "add_dy needs N == K, got N ", op.n, " and K ", op.k);
  op.dy = check.matrix("dy", dy), op.pre = f32_matrix(pre), op.add_dy = add_dy;
  Tensor dx = need_dx ? empty(x, {op.m, op.k}) : empty(x, {0});
  if (need_dx) op.dx = check.matrix("dx", dx);
  Tensor d_down = empty(down, {op.r, op.k}), d_up = empty(up, {op.n, op.r});
  Tensor d_down_bias = empty(down, {op.r}), d_up_bias = empty(up, {op.n});
  op.d_down = check.matrix("d_down", d_down), op.d_up = check.matrix("d_up", d_up);
  op.d_down_bias = check.matrix("d_down_bias", d_down_bias), op.d_up_bias = check.matrix("d_up_bias", d_up_bias);
  PEFTKERN_CALL(bottleneck_backward, op);
  return {dx, d_down, d_down_bias, d_up, d_up_bias};
}

}  // namespace
}  // namespace peftkern

namespace torch::stable::detail {
template <>
struct ToImpl<peftkern::Name> {
  static peftkern::Name call(StableIValue value, uint64_t /*extension_build_version*/, bool /*is_internal*/) {
    const StringHandle handle = to<StringHandle>(value);
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    peftkern::Name name{};
    std::strncpy(name.text, text, sizeof name.text - 1);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
}  // namespace torch::stable::detail

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def(
      "bottleneck_forward(Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? residual, "
      "str act, float scale, float p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "bottleneck_backward(Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, str act, float scale, float p, "
      "Tensor? seed, bool add_dy, bool need_dx) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&peftkern::bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&peftkern::bottleneck_backward));
}

#else  // once per instruction set

#include "simd.h"
#include "skinny.h"
#include "activation.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

template <class Lane, class T>
void forward(const Bottleneck& op) {
  static_assert(kBiasPadding >= kPanel);
  const DotPack<Lane> down(op.r, op.k);
  const PanelPack<Lane> up(op.r, op.n);
  pack_dot(down, op.down, op.k);
  pack_panel(up, op.up.transposed(), op.r, op.n);
  const int64_t ldb = mask_stride(op.n);
  const float scale = op.scale * op.drop.inverse_keep;
  std::vector<float> up_bias = op.up_bias;
  for (float& value : up_bias) value *= scale;
  for_tasks(ceil_div(op.m, kRowChunk), kRowChunk * op.r * (op.k + op.n), [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> bits(op.drop.on ? kRowChunk * ldb + kMaskSlack : 0);
    Buffer<float> z(kRowChunk * op.r);
    Buffer<Lane> lanes(kRowChunk * up.depth);
    RowKey keys[kRowChunk];
    for_chunks(op.m, begin, end, [&](int64_t m, int64_t rows) {
      float* pre = op.pre.as<float>() + m * op.r;
      shrink<Lane, T>(op.x.as<const T>() + m * op.x.row, op.x.row, rows, op.m - m - rows, op.k, nullptr, 0, down, 1.0f,
                      pre, op.r);
      if (!op.down_bias.empty())
        for (int64_t i = 0; i < rows; ++i) add_line(op.down_bias.data(), op.r, pre + i * op.r);
      activate(op.act, pre, rows * op.r, z.get(), nullptr);
      if (op.drop.on) {
        for (int64_t i = 0; i < rows; ++i) keys[i] = row_key(op.drop.seed, m + i);
        keep_bits(keys, rows, 0, op.n, op.drop.threshold, bits.get(), ldb);
      }
      const T* residual = op.residual.data ? op.residual.as<const T>() + m * op.residual.row : nullptr;
      const ExpandTo<T> to{op.y.as<T>() + m * op.y.row,
                           op.y.row,
                           residual,
                           op.residual.row,
                           up_bias.empty() ? nullptr : up_bias.data(),
                           op.drop.on ? bits.get() : nullptr,
                           ldb,
                           0};
      lanes_along_r(z.get(), rows, op.r, scale, up.depth, lanes.get());
      expand(lanes.get(), rows, up, 0, up.panels, op.n, to);
    });
  });
}

// What the row-parallel half of backward leaves for the column-parallel half.
template <class Lane>
struct Half {
  TallPack<Lane> z, dpre;
  Buffer<float> bias_sums;  // of dpre, [row chunks, R]
  Buffer<uint8_t> bits;     // the whole dropout mask, an eighth of a byte an element
  int64_t ldb;
  explicit Half(const Bottleneck& op)
      : z(op.m, op.r, true),
        dpre(op.m, op.r, false),
        bias_sums(ceil_div(op.m, kRowChunk) * op.r),
        bits(op.drop.on ? op.m * mask_stride(op.n) + kMaskSlack : 0),
        ldb(mask_stride(op.n)) {}
};

// dz = a * drop(dy) up, dpre = dz * act'(pre), dx = dpre down (+ dy).
template <class Lane, class T>
void backward_rows(const Bottleneck& op, Half<Lane>& half) {
  const DotPack<Lane> up(op.r, op.n);
  const PanelPack<Lane> down(op.r, op.k);
  pack_dot(up, op.up.transposed(), op.n);
  if (op.dx.data) pack_panel(down, op.down, op.r, op.k);
  for_tasks(ceil_div(op.m, kRowChunk), kRowChunk * op.r * (op.k + op.n), [&](int64_t begin, int64_t end) {
    Buffer<float> z(kRowChunk * op.r), slope(kRowChunk * op.r), dpre(kRowChunk * op.r);
    Buffer<Lane> lanes(kRowChunk * down.depth);
    RowKey keys[kRowChunk];
    for_chunks(op.m, begin, end, [&](int64_t m, int64_t rows) {
      uint8_t* bits = nullptr;
      if (op.drop.on) {
        bits = half.bits.get() + m * half.ldb;
        for (int64_t i = 0; i < rows; ++i) keys[i] = row_key(op.drop.seed, m + i);
        keep_bits(keys, rows, 0, op.n, op.drop.threshold, bits, half.ldb);
      }
      const T* dy = op.dy.as<const T>() + m * op.dy.row;
      shrink<Lane, T>(dy, op.dy.row, rows, op.m - m - rows, op.n, bits, half.ldb, up, op.scale * op.drop.inverse_keep,
                      dpre.get(), op.r);
      activate(op.act, op.pre.as<const float>() + m * op.r, rows * op.r, z.get(), slope.get());
      float* sums = half.bias_sums.get() + m / kRowChunk * op.r;
      for (int64_t j = 0; j < op.r; ++j) sums[j] = 0.0f;
      for (int64_t i = 0; i < rows * op.r; i += op.r) {
        multiply_line(slope.get() + i, op.r, dpre.get() + i);
        add_line(dpre.get() + i, op.r, sums);
      }
      half.z.fill(z.get(), op.r, op.r, m, m + rows);
      half.dpre.fill(dpre.get(), op.r, op.r, m, m + rows);
      if (!op.dx.data) return;
      const ExpandTo<T> to{
          op.dx.as<T>() + m * op.dx.row, op.dx.row, op.add_dy ? dy : nullptr, op.dy.row, nullptr, nullptr, 0, 0};
      lanes_along_r(dpre.get(), rows, op.r, 1.0f, down.depth, lanes.get());
      expand(lanes.get(), rows, down, 0, down.panels, op.k, to);
    });
  });
}

// d_up, d_up_bias = a * drop(dy)^T [z, 1] by columns of dy, and d_down = dpre^T x by columns of x.
template <class Lane, class T>
void backward_cols(const Bottleneck& op, const Half<Lane>& half) {
  constexpr int64_t kBlock = kColBlock<T>;
  auto add = [&](Outer<Lane, T>& outer, const Matrix& wide, int64_t c0, int64_t cols, const uint8_t* bits) {
    for_chunks(op.m, [&](int64_t m, int64_t rows) {
      outer.add(wide.as<const T>(), wide.row, m, rows, c0, cols, bits ? bits + m * half.ldb + c0 / 8 : nullptr,
                half.ldb);
    });
  };
  auto of_dy = [&](int64_t i) {
    const float scale = op.scale * op.drop.inverse_keep;
    Outer<Lane, T> outer(half.z);
    add(outer, op.dy, i * kBlock, op.n, op.drop.on ? half.bits.get() : nullptr);
    outer.write(0, op.r, i * kBlock, op.n, scale, op.d_up.transposed());
    outer.write(op.r, 1, i * kBlock, op.n, scale, op.d_up_bias);
  };
  auto of_x = [&](int64_t i) {
    Outer<Lane, T> outer(half.dpre);
    add(outer, op.x, i * kBlock, op.k, nullptr);
    outer.write(0, op.r, i * kBlock, op.k, 1.0f, op.d_down);
  };
  for_tasks_of_two(ceil_div(op.n, kBlock), ceil_div(op.k, kBlock), op.m * kBlock * op.r, of_dy, of_x);
}

template <class Lane, class T>
void backward(const Bottleneck& op) {
  Half<Lane> half(op);
  backward_rows<Lane, T>(op, half);
  Buffer<float> sums(op.r);
  for (int64_t j = 0; j < op.r; ++j) sums.get()[j] = 0.0f;
  for (int64_t i = 0; i < ceil_div(op.m, kRowChunk); ++i) add_line(half.bias_sums.get() + i * op.r, op.r, sums.get());
  with_dtype(op.d_down_bias.dtype, [&](auto* p) {
    write_line(sums.get(), op.r, 1.0f, op.d_down_bias.as<std::remove_pointer_t<decltype(p)> >());
  });
  backward_cols<Lane, T>(op, half);
}

}  // namespace

void bottleneck_forward(const Bottleneck& op) {
  with_lane(op.x.dtype, op.down.dtype,
            [&](auto lane, auto* t) { forward<decltype(lane), std::remove_pointer_t<decltype(t)> >(op); });
}

void bottleneck_backward(const Bottleneck& op) {
  with_lane(op.x.dtype, op.down.dtype,
            [&](auto lane, auto* t) { backward<decltype(lane), std::remove_pointer_t<decltype(t)> >(op); });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
