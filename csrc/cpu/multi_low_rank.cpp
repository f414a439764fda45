// y += s_i * (drop(x) A_i^T) B_i^T for the rows of each adapter i, and the gradients. This file includes itself once
// per instruction set (foreach_isa.h).
//
// Rows are grouped by adapter. A group of many rows is a problem of low_rank.cpp, which packs A and B first; a few rows
// go through multi_few.h.
#ifndef PEFTKERN_ISA

#include <vector>

#include "check.h"
#include "low_rank.h"

namespace peftkern {

struct Adapter {
  Matrix a, b;       // [R, K] and [N, R], contiguous, of one dtype
  int64_t r, ranks;  // its rank, and the sum of the ranks before it
  float scale;
  int64_t begin, count;  // its rows are order[begin : begin + count]
};

struct MultiLowRank {
  int64_t m, k, n, most, count;  // most: the largest rank; count: adapters
  const Adapter* adapters;
  const int64_t* order;
  Matrix x, y, h, dy, dx;  // h [M, most]
  float *da, *db;          // all [R, K], and all [N, R], one behind the other; absent ones are null
  Dropout drop;
};

}  // namespace peftkern

#define PEFTKERN_ISA_FILE "multi_low_rank.cpp"
#include "foreach_isa.h"

namespace peftkern {
namespace {

// What a call is about: the table of peftkern/ops/_adapters.py, read and checked, and the rows sorted by adapter.
struct Call {
  std::vector<Adapter> adapters;
  std::vector<int64_t> order;
  MultiLowRank op{};

  Call(const CpuCheck& check, const Tensor& x, const Tensor& table, const Tensor& index, int64_t n, int64_t most,
       int64_t ranks, int64_t dtype, double p, const std::optional<Tensor>& seed) {
    constexpr int64_t kColumns = 5;
    check.dims("x", x, 2);
    check.dims("table", table, 2);
    check.dims("index", index, 1);
    op.m = x.size(0), op.k = x.size(1), op.n = n, op.most = most, op.count = table.size(0);
    check.positive("M", op.m), check.positive("K", op.k), check.positive("N", op.n), check.positive("R", op.most);
    check.shape("x", x, {op.m, op.k}, true);
    check.shape("table", table, {op.count, kColumns});
    check.dtype("table", table, ScalarType::Long);
    check.dtype("index", index, ScalarType::Long);
    check.shape("index", index, {index.size(0)});
    check.that(index.size(0) > 0 && op.m % index.size(0) == 0, "index has ", index.size(0), " entries for ", op.m,
               " rows");
    op.x = check.matrix("x", x);
    op.drop = check.dropout(p, seed);
    check.that(dtype >= 0 && dtype <= 2, "the adapters' dtype has code ", dtype, ", want 0 (f32), 1 (bf16) or 2 (f16)");
    const Dtype type = static_cast<Dtype>(dtype);
    const int64_t* cell = static_cast<const int64_t*>(table.const_data_ptr());
    int64_t before = 0;
    for (int64_t i = 0; i < op.count; ++i, cell += kColumns) {
      const int64_t r = cell[2];
      check.that(r >= 1 && r <= most && cell[3] == before, "row ", i, " of the table does not fit the others");
      const Matrix a{reinterpret_cast<void*>(cell[0]), type, op.k, 1}, b{reinterpret_cast<void*>(cell[1]), type, r, 1};
      adapters.push_back({a, b, r, before, from_bits(static_cast<uint32_t>(cell[4])), 0, 0});
      before += r;
    }
    check.that(before == ranks, "the table's ranks add up to ", before, ", want ", ranks);
    sort(check, static_cast<const int64_t*>(index.const_data_ptr()), index.size(0));
    op.adapters = adapters.data(), op.order = order.data();
  }

  // A stable counting sort: rows of one adapter stay in their order.
  void sort(const CpuCheck& check, const int64_t* index, int64_t entries) {
    const int64_t rows = op.m / entries;
    for (int64_t e = 0; e < entries; ++e) {
      check.that(index[e] >= -1 && index[e] < op.count, "index[", e, "] is ", index[e], ", want -1 to ", op.count - 1);
      if (index[e] >= 0) adapters[index[e]].count += rows;
    }
    int64_t begin = 0;
    for (Adapter& adapter : adapters) {
      adapter.begin = begin;
      begin += adapter.count;
      adapter.count = 0;
    }
    order.resize(begin);
    for (int64_t e = 0; e < entries; ++e) {
      if (index[e] < 0) continue;
      Adapter& adapter = adapters[index[e]];
      for (int64_t i = 0; i < rows; ++i) order[adapter.begin + adapter.count++] = e * rows + i;
    }
  }
};

Tensor zeros_f32(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor t = empty_f32(like, shape);
  std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel()) * sizeof(float));
  return t;
}

Tensor multi_low_rank_forward(const Tensor& x, const Tensor& table, const Tensor& index, const Tensor& y, int64_t most,
                              int64_t ranks, int64_t dtype, bool, double p, const std::optional<Tensor>& seed) {
  const CpuCheck check("multi_low_rank_forward");
  check.dims("y", y, 2);
  Call call(check, x, table, index, y.size(1), most, ranks, dtype, p, seed);
  MultiLowRank& op = call.op;
  check.shape("y", y, {op.m, op.n});
  check.dtype("y", y, x.scalar_type());
  Tensor h = zeros_f32(x, {op.m, most});
  op.y = check.matrix("y", y), op.h = f32_matrix(h);
  PEFTKERN_CALL(multi_low_rank_forward, op);
  return h;
}

std::tuple<Tensor, Tensor> multi_low_rank_backward(const Tensor& dy, const Tensor& x, const Tensor& table,
                                                   const Tensor& index, const Tensor& h,
                                                   const std::optional<Tensor>& dx, int64_t most, int64_t ranks,
                                                   int64_t dtype, bool, double p, const std::optional<Tensor>& seed,
                                                   bool need_a, bool need_b) {
  const CpuCheck check("multi_low_rank_backward");
  check.dims("dy", dy, 2);
  Call call(check, x, table, index, dy.size(1), most, ranks, dtype, p, seed);
  MultiLowRank& op = call.op;
  check.shape("dy", dy, {op.m, op.n}, true);
  check.dtype("dy", dy, x.scalar_type());
  check.shape("h", h, {op.m, most});
  check.dtype("h", h, ScalarType::Float);
  op.dy = check.matrix("dy", dy), op.h = f32_matrix(h);
  if (dx.has_value()) {
    check.shape("dx", *dx, {op.m, op.k});
    check.dtype("dx", *dx, x.scalar_type());
    op.dx = check.matrix("dx", *dx);
  }
  // Zeros: what an adapter without rows gets.
  Tensor da = zeros_f32(x, {need_a ? ranks * op.k : 0}), db = zeros_f32(x, {need_b ? ranks * op.n : 0});
  op.da = need_a ? static_cast<float*>(da.mutable_data_ptr()) : nullptr;
  op.db = need_b ? static_cast<float*>(db.mutable_data_ptr()) : nullptr;
  PEFTKERN_CALL(multi_low_rank_backward, op);
  return {da, db};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def(
      "multi_low_rank_forward(Tensor x, Tensor table, Tensor index, Tensor(a!) y, int R, int ranks, int dtype, bool "
      "aligned, float p, Tensor? seed) -> "
      "Tensor");
  m.def(
      "multi_low_rank_backward(Tensor dy, Tensor x, Tensor table, Tensor index, Tensor h, Tensor(a!)? dx, int R, "
      "int ranks, int dtype, bool aligned, float p, Tensor? seed, bool need_a, bool need_b) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("multi_low_rank_forward", TORCH_BOX(&peftkern::multi_low_rank_forward));
  m.impl("multi_low_rank_backward", TORCH_BOX(&peftkern::multi_low_rank_backward));
}

#else  // once per instruction set

#include "simd.h"
#include "skinny.h"
#include "multi_few.h"

namespace peftkern::PEFTKERN_ISA {

void low_rank_forward(const LowRank& op);
void low_rank_backward(const LowRank& op);

namespace {

// The rows of one adapter as a matrix: a strided view where they are evenly spaced, else a copy.
template <class T>
class Rows {
 public:
  Rows(const Matrix& whole, const int64_t* rows, int64_t count, int64_t cols)
      : whole_(whole), rows_(rows), count_(count), cols_(cols), copy_(copied() ? count * cols : 0) {
    if (!copied()) return;
    for_tasks(count_, cols_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(copy_.get() + i * cols_, at(i), bytes());
    });
  }
  Matrix matrix() const {
    if (whole_.data == nullptr) return {};
    if (copied()) return {copy_.get(), whole_.dtype, cols_, 1};
    return {at(0), whole_.dtype, whole_.row * (count_ > 1 ? rows_[1] - rows_[0] : 1), 1};
  }
  // Puts a copy's rows back where they came from.
  void put_back() const {
    if (!copied()) return;
    for_tasks(count_, cols_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(at(i), copy_.get() + i * cols_, bytes());
    });
  }

 private:
  bool copied() const {
    if (whole_.data == nullptr) return false;
    for (int64_t i = 2; i < count_; ++i)
      if (rows_[i] - rows_[i - 1] != rows_[1] - rows_[0]) return true;
    return false;
  }
  T* at(int64_t i) const { return whole_.as<T>() + rows_[i] * whole_.row; }
  size_t bytes() const { return static_cast<size_t>(cols_) * sizeof(T); }

  Matrix whole_;
  const int64_t* rows_;
  int64_t count_, cols_;
  Buffer<T> copy_;
};

LowRank problem(const MultiLowRank& op, const Adapter& adapter) {
  LowRank one{};
  one.m = adapter.count, one.k = op.k, one.n = op.n, one.r = adapter.r;
  one.a = adapter.a, one.b = adapter.b, one.scale = adapter.scale;
  one.drop = op.drop, one.ids = op.order + adapter.begin;
  return one;
}

// h of one adapter's rows, [count, R], from or to op.h.
template <class F>
void for_latents(const MultiLowRank& op, const Adapter& adapter, float* own, const F& f) {
  for (int64_t i = 0; i < adapter.count; ++i)
    f(own + i * adapter.r, op.h.as<float>() + op.order[adapter.begin + i] * op.most, adapter.r * sizeof(float));
}

template <class T>
void forward_many(const MultiLowRank& op, const Adapter& adapter) {
  const int64_t* rows = op.order + adapter.begin;
  const Rows<T> x(op.x, rows, adapter.count, op.k), y(op.y, rows, adapter.count, op.n);
  Buffer<float> h(adapter.count * adapter.r);
  LowRank one = problem(op, adapter);
  one.x = x.matrix(), one.y = one.base = y.matrix(), one.h = {h.get(), Dtype::f32, adapter.r, 1};
  low_rank_forward(one);
  y.put_back();
  for_latents(op, adapter, h.get(), [](float* own, float* all, size_t n) { std::memcpy(all, own, n); });
}

template <class T>
void backward(const MultiLowRank& op, const Adapter& adapter) {
  const int64_t* rows = op.order + adapter.begin;
  const Rows<T> x(op.x, rows, adapter.count, op.k), dy(op.dy, rows, adapter.count, op.n);
  const Rows<T> dx(op.dx, rows, adapter.count, op.k);
  Buffer<float> h(adapter.count * adapter.r);
  for_latents(op, adapter, h.get(), [](float* own, float* all, size_t n) { std::memcpy(own, all, n); });
  LowRank one = problem(op, adapter);
  one.x = x.matrix(), one.dy = dy.matrix(), one.dx = dx.matrix(), one.h = {h.get(), Dtype::f32, adapter.r, 1};
  if (op.da) one.da = {op.da + adapter.ranks * op.k, Dtype::f32, op.k, 1};
  if (op.db) one.db = {op.db + adapter.ranks * op.n, Dtype::f32, adapter.r, 1};
  low_rank_backward(one);
  dx.put_back();
}

}  // namespace

void multi_low_rank_forward(const MultiLowRank& op) {
  with_dtype(op.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t i = 0; i < op.count; ++i)
      if (op.adapters[i].count > 0 && !is_few(op, op.adapters[i])) forward_many<T>(op, op.adapters[i]);
    forward_few<T>(op);
  });
}

void multi_low_rank_backward(const MultiLowRank& op) {
  with_dtype(op.x.dtype, [&](auto* t) {
    for (int64_t i = 0; i < op.count; ++i)
      if (op.adapters[i].count > 0) backward<std::remove_pointer_t<decltype(t)> >(op, op.adapters[i]);
  });
}

}  // namespace peftkern::PEFTKERN_ISA

#endif
