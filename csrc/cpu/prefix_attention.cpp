// Attention over [Pk; K], [Pv; V] and its gradients, without the concatenation. This file includes itself once per
// instruction set (foreach_isa.h).
//
// A task owns one head of keys and values of one batch row. It lays their f32 values out in blocks of kKeys, prefix and
// text one after the other, and walks over them with blocks of queries: online softmax (Milakov and Gimelshein,
// arXiv:1805.02867), the weights made again in backward (Dao et al., arXiv:2205.14135). Few queries, as in decoding,
// read keys and values where they lie.
#ifndef PEFTKERN_ISA

#include <thread>
#include <vector>

#include "check.h"

namespace peftkern {

// [B, H, N, D] with unit stride along D; strides in elements.
struct Heads {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, head = 0, row = 0;
  template <class T>
  T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * batch + h * head;
  }
};

struct Attention {
  int64_t b, hq, hkv, s, l, t, d;
  Heads q, k, v, pk, pv, out, dout, dq, dk, dv, dpk, dpv;  // dpk and dpv are f32, the others q's dtype
  float *top, *sum;  // highest score of a query, and its sum of exp(score - top), [B, Hq, S]
  const void* mask;  // [B, Hq, S, L] bool or f32, or null
  bool mask_is_bool, causal;
  int64_t mask_batch, mask_head, mask_row;
  float scale;
  Dropout drop;
  int64_t keys() const { return t + l; }
  int64_t group() const { return hq / hkv; }
  // Number of keys that query i may see with `causal`.
  int64_t seen(int64_t i) const {
    const int64_t n = t + l - s + i + 1;
    return n < t ? t : n < t + l ? n : t + l;
  }
};

}  // namespace peftkern

#define PEFTKERN_ISA_FILE "prefix_attention.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

Heads heads(const CpuCheck& check, const char* name, const Tensor& t, int64_t b, int64_t h, int64_t n, int64_t d) {
  check.dims(name, t, 4);
  check.that(t.is_cpu(), name, " is not on the CPU");
  check.that(has_shape(t, {b, h, n, d}), name, " has shape ", Shape{t}, ", want ", Wanted{{b, h, n, d}});
  check.that(d == 1 || t.stride(3) == 1, name, " has stride ", t.stride(3), " in dimension 3, want 1");
  return {const_cast<void*>(t.const_data_ptr()), check.floating(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

Attention attention_args(const CpuCheck& check, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk,
                         const Tensor& pv, const std::optional<Tensor>& mask, bool causal, double scale, double p,
                         const std::optional<Tensor>& seed) {
  check.dims("q", q, 4), check.dims("k", k, 4), check.dims("pk", pk, 4);
  Attention op{};
  op.b = q.size(0), op.hq = q.size(1), op.s = q.size(2), op.d = q.size(3);
  op.hkv = k.size(1), op.l = k.size(2), op.t = pk.size(2);
  for (const auto& [name, n] : {std::pair{"B", op.b}, {"Hq", op.hq}, {"Hkv", op.hkv}, {"S", op.s}, {"L", op.l}})
    check.positive(name, n);
  check.positive("T", op.t), check.positive("D", op.d);
  check.that(op.hq % op.hkv == 0, "Hq is ", op.hq, ", want a multiple of Hkv, ", op.hkv);
  op.q = heads(check, "q", q, op.b, op.hq, op.s, op.d);
  op.k = heads(check, "k", k, op.b, op.hkv, op.l, op.d);
  op.v = heads(check, "v", v, op.b, op.hkv, op.l, op.d);
  op.pk = heads(check, "pk", pk, op.b, op.hkv, op.t, op.d);
  op.pv = heads(check, "pv", pv, op.b, op.hkv, op.t, op.d);
  for (const Tensor* same : {&k, &v, &pk, &pv})
    check.that(same->scalar_type() == q.scalar_type(), "k, v, pk and pv want the dtype of q");
  if (mask.has_value()) {
    check.dims("mask", *mask, 4);
    check.that(has_shape(*mask, {op.b, op.hq, op.s, op.l}), "mask has shape ", Shape{*mask}, ", want ",
               Wanted{{op.b, op.hq, op.s, op.l}});
    check.that(op.l == 1 || mask->stride(3) == 1, "mask has stride ", mask->stride(3), " in dimension 3, want 1");
    op.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!op.mask_is_bool) check.dtype("mask", *mask, ScalarType::Float);
    op.mask = mask->const_data_ptr();
    op.mask_batch = mask->stride(0), op.mask_head = mask->stride(1), op.mask_row = mask->stride(2);
  }
  op.causal = causal, op.scale = static_cast<float>(scale), op.drop = check.dropout(p, seed);
  return op;
}

std::tuple<Tensor, Tensor> prefix_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk,
                                                    const Tensor& pv, const std::optional<Tensor>& mask, bool causal,
                                                    double scale, double p, const std::optional<Tensor>& seed) {
  const CpuCheck check("prefix_attention_forward");
  Attention op = attention_args(check, q, k, v, pk, pv, mask, causal, scale, p, seed);
  Tensor out = empty(q, {op.b, op.hq, op.s, op.d});
  Tensor norm = empty_f32(q, {2, op.b, op.hq, op.s});
  op.out = heads(check, "out", out, op.b, op.hq, op.s, op.d);
  op.top = norm.mutable_data_ptr<float>(), op.sum = op.top + op.b * op.hq * op.s;
  PEFTKERN_CALL(prefix_attention_forward, op);
  return {out, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk, const Tensor& pv,
    const std::optional<Tensor>& mask, const Tensor& out, const Tensor& norm, bool causal, double scale, double p,
    const std::optional<Tensor>& seed) {
  const CpuCheck check("prefix_attention_backward");
  Attention op = attention_args(check, q, k, v, pk, pv, mask, causal, scale, p, seed);
  op.dout = heads(check, "dout", dout, op.b, op.hq, op.s, op.d);
  op.out = heads(check, "out", out, op.b, op.hq, op.s, op.d);
  check.dtype("dout", dout, q.scalar_type()), check.dtype("out", out, q.scalar_type());
  check.shape("norm", norm, {2, op.b, op.hq, op.s});
  check.dtype("norm", norm, ScalarType::Float);
  op.top = const_cast<float*>(norm.const_data_ptr<float>()), op.sum = op.top + op.b * op.hq * op.s;
  Tensor dq = empty(q, {op.b, op.hq, op.s, op.d});
  Tensor dk = empty(q, {op.b, op.hkv, op.l, op.d});
  Tensor dv = empty(q, {op.b, op.hkv, op.l, op.d});
  Tensor dpk = empty_f32(q, {op.b, op.hkv, op.t, op.d}), dpv = empty_f32(q, {op.b, op.hkv, op.t, op.d});
  op.dq = heads(check, "dq", dq, op.b, op.hq, op.s, op.d);
  op.dk = heads(check, "dk", dk, op.b, op.hkv, op.l, op.d);
  op.dv = heads(check, "dv", dv, op.b, op.hkv, op.l, op.d);
  op.dpk = heads(check, "dpk", dpk, op.b, op.hkv, op.t, op.d);
  op.dpv = heads(check, "dpv", dpv, op.b, op.hkv, op.t, op.d);
  PEFTKERN_CALL(prefix_attention_backward, op);
  return {dq, dk, dv, dpk, dpv};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def(
      "prefix_attention_forward(Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor? mask, bool causal, "
      "float scale, float p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "prefix_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor? mask, "
      "Tensor out, Tensor norm, bool causal, float scale, float p, Tensor? seed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&peftkern::prefix_attention_forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&peftkern::prefix_attention_backward));
}

#else  // once per instruction set

#include "simd.h"
#include "skinny.h"
#include "exponential.h"
#include "attend.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

// The online softmax of one block of queries over all blocks of keys; out, and what backward needs to find the weights
// again, of its rows.
template <class T>
void forward_rows(const Attention& op, const Blocks& keys, int64_t b, int64_t kvh, int64_t row, int64_t rows,
                  Scratch& w) {
  gather(op.q, b, kvh, op.group(), op.s, row, rows, op.d, w.width, w.q.get(), static_cast<T*>(nullptr));
  float highest[kQueries], sum[kQueries];
  for (int64_t i = 0; i < rows; ++i) highest[i] = -INFINITY, sum[i] = 0.0f;
  std::memset(w.o.get(), 0, static_cast<size_t>(rows * w.width) * sizeof(float));
  const Rows at(op, b, kvh, row, rows);
  for (int64_t block = 0; block < keys.count; ++block) {
    const int64_t j0 = block * kKeys, n = keys.size(block), padded = keys.padded(block);
    if (at.hidden(j0, n)) continue;
    multiply(w.q.get(), w.width, 1, keys.k_columns(block), kKeys, rows, padded, op.d, w.p.get(), kKeys, false,
             op.scale);
    at.mask(j0, n, w.p.get());
    for (int64_t i = 0; i < rows; ++i) {
      float* p = w.p.get() + i * kKeys;
      const float top = std::fmax(highest[i], row_max(p, padded));
      const float fade = std::exp(highest[i] - top);
      sum[i] = sum[i] * fade + exponentials(p, padded, top);
      highest[i] = top;
      if (fade != 1.0f) scale_row(w.o.get() + i * w.width, w.width, fade);
    }
    if (op.drop.on) at.drop(j0, n, w.p.get(), w.bits.get());
    multiply(w.p.get(), kKeys, 1, keys.v_rows(block), w.width, rows, w.width, n, w.o.get(), w.width, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const auto [h, s] = at.place(i);
    store_row(w.o.get() + i * w.width, op.drop.inverse_keep / sum[i], op.d, op.out.at<T>(b, h) + s * op.out.row);
    at.note(i, highest[i], sum[i]);
  }
}

template <class T>
void forward(const Attention& op) {
  const int64_t rows = op.group() * op.s, pairs = op.b * op.hkv;
  if (rows <= kFew) return decode<T>(op);
  // Where there are fewer heads than threads their queries are shared out too, and keys and values laid out again.
  const int64_t threads = static_cast<int64_t>(std::thread::hardware_concurrency());
  int64_t parts = ceil_div(2 * threads, pairs);
  if (parts > ceil_div(rows, 4 * kQueries)) parts = ceil_div(rows, 4 * kQueries);
  if (pairs >= threads) parts = 1;
  const int64_t share = round_up(ceil_div(rows, parts), kQueries);
  for_tasks(pairs * parts, share * op.keys() * op.d * 2, [&](int64_t begin, int64_t end) {
    Scratch w(op, false);
    Blocks keys(op, false);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts / op.hkv, kvh = task / parts % op.hkv, part = task % parts;
      if (part == 0 || task == begin) keys.fill<T>(op, b, kvh);
      const int64_t last = (part + 1) * share < rows ? (part + 1) * share : rows;
      for (int64_t row = part * share; row < last; row += kQueries)
        forward_rows<T>(op, keys, b, kvh, row, last - row < kQueries ? last - row : kQueries, w);
    }
  });
}

// Gradients of one block of queries; those of keys and values are added up in w.dk and w.dv.
template <class T>
void backward_rows(const Attention& op, const Blocks& keys, int64_t b, int64_t kvh, int64_t row, int64_t rows,
                   Scratch& w) {
  T* const none = nullptr;
  gather(op.q, b, kvh, op.group(), op.s, row, rows, op.d, w.width, w.q.get(), none);
  gather(op.dout, b, kvh, op.group(), op.s, row, rows, op.d, w.width, w.dout.get(), none);
  gather(op.out, b, kvh, op.group(), op.s, row, rows, op.d, w.width, w.o.get(), none);
  const Rows at(op, b, kvh, row, rows);
  float delta[kQueries];
  for (int64_t i = 0; i < rows; ++i) {
    // In f64: its error is that of every slope of the row, from which it is subtracted.
    double sum = 0.0;
    for (int64_t c = i * w.width; c < (i + 1) * w.width; ++c)
      sum += static_cast<double>(w.o.get()[c]) * static_cast<double>(w.dout.get()[c]);
    delta[i] = static_cast<float>(sum);
  }
  float *const p = w.p.get(), *const dp = w.dp.get(), *const dq = w.o.get();
  std::memset(dq, 0, static_cast<size_t>(rows * w.width) * sizeof(float));
  for (int64_t block = 0; block < keys.count; ++block) {
    const int64_t j0 = block * kKeys, n = keys.size(block), padded = keys.padded(block);
    if (at.hidden(j0, n)) continue;
    multiply(w.q.get(), w.width, 1, keys.k_columns(block), kKeys, rows, padded, op.d, p, kKeys, false, op.scale);
    multiply(w.dout.get(), w.width, 1, keys.v_columns(block), kKeys, rows, padded, op.d, dp, kKeys, false);
    at.mask(j0, n, p);
    for (int64_t i = 0; i < rows; ++i) at.weights(i, padded, p + i * kKeys);
    if (op.drop.on) at.keep(j0, n, w.bits.get());
    for (int64_t i = 0; i < rows; ++i)
      slopes(p + i * kKeys, dp + i * kKeys, padded, delta[i], op, op.drop.on ? w.bits.get() + i * kMaskBytes : nullptr);
    float* const dv = w.dv.get() + j0 * w.width;
    float* const dk = w.dk.get() + j0 * w.width;
    multiply(p, 1, kKeys, w.dout.get(), w.width, n, w.width, rows, dv, w.width, true);
    multiply(dp, 1, kKeys, w.q.get(), w.width, n, w.width, rows, dk, w.width, true);
    multiply(dp, kKeys, 1, keys.k_rows(block), w.width, rows, w.width, n, dq, w.width, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const auto [h, s] = at.place(i);
    store_row(dq + i * w.width, op.scale, op.d, op.dq.at<T>(b, h) + s * op.dq.row);
  }
}

template <class T>
void backward(const Attention& op) {
  const int64_t rows = op.group() * op.s;
  for_tasks(op.b * op.hkv, rows * op.keys() * op.d * 5, [&](int64_t begin, int64_t end) {
    Scratch w(op, true);
    Blocks keys(op, true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / op.hkv, kvh = task % op.hkv;
      keys.fill<T>(op, b, kvh);
      const size_t bytes = static_cast<size_t>(keys.count * kKeys * w.width) * sizeof(float);
      std::memset(w.dk.get(), 0, bytes), std::memset(w.dv.get(), 0, bytes);
      for (int64_t row = 0; row < rows; row += kQueries)
        backward_rows<T>(op, keys, b, kvh, row, rows - row < kQueries ? rows - row : kQueries, w);
      for (int64_t j = 0; j < op.t; ++j) {
        store_row(w.dk.get() + j * w.width, op.scale, op.d, op.dpk.at<float>(b, kvh) + j * op.dpk.row);
        store_row(w.dv.get() + j * w.width, 1.0f, op.d, op.dpv.at<float>(b, kvh) + j * op.dpv.row);
      }
      for (int64_t j = 0; j < op.l; ++j) {
        store_row(w.dk.get() + (op.t + j) * w.width, op.scale, op.d, op.dk.at<T>(b, kvh) + j * op.dk.row);
        store_row(w.dv.get() + (op.t + j) * w.width, 1.0f, op.d, op.dv.at<T>(b, kvh) + j * op.dv.row);
      }
    }
  });
}

}  // namespace

void prefix_attention_forward(const Attention& op) {
  with_dtype(op.q.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)> >(op); });
}

void prefix_attention_backward(const Attention& op) {
  with_dtype(op.q.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)> >(op); });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
