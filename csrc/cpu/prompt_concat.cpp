// Prompt rows in front of the first real token of every row, with mask, positions and labels; and the gradients.
// Rows are copied whole, so there is nothing here for wider instruction sets.
#include "check.h"

namespace peftkern {
namespace {

void from_float(float x, float* out) { *out = x; }
void from_float(float x, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
void from_float(float x, F16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < (113u << 23)) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const float sum = from_bits(magnitude) + 0.5f;
    std::memcpy(&half, &sum, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

// The prompt in the dtype of the output.
template <class T, class P>
void convert(const P* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) from_float(to_float(from[i]), to + i);
}

int64_t first_one(const int64_t* mask, int64_t length) {
  for (int64_t s = 0; s < length; ++s)
    if (mask[s] != 0) return s;
  return 0;
}

struct Sizes {
  int64_t batch, length, prompt, hidden;
  int64_t out() const { return length + prompt; }
};

// Row (b, j) of the output comes from input row `source`, or is prompt row j - start where source is -1.
int64_t source_row(int64_t j, int64_t start, int64_t prompt) {
  if (j < start) return j;
  return j < start + prompt ? -1 : j - prompt;
}

const int64_t* longs(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }
int64_t* mutable_longs(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

// Mask, positions and labels (if wanted) of one row.
void write_row(const int64_t* mask, const int64_t* labels, int64_t start, const Sizes& n, int64_t* mask_out,
               int64_t* positions, int64_t* labels_out) {
  int64_t ones = 0;
  for (int64_t j = 0; j < n.out(); ++j) {
    const int64_t s = source_row(j, start, n.prompt);
    mask_out[j] = s < 0 ? 1 : mask[s];
    ones += mask_out[j];
    positions[j] = ones > 0 ? ones - 1 : 0;
    if (labels) labels_out[j] = s < 0 ? -100 : labels[s];
  }
}

void check_ids(const CpuCheck& check, const int64_t* ids, int64_t n, int64_t vocabulary) {
  for (int64_t i = 0; i < n; ++i)
    check.that(ids[i] >= 0 && ids[i] < vocabulary, "ids has ", ids[i], " at flat index ", i, ", want 0 <= id < ",
               vocabulary);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_concat_forward(const std::optional<Tensor>& ids, const Tensor& source,
                                                                 const Tensor& prompt, const Tensor& mask,
                                                                 const std::optional<Tensor>& labels) {
  const CpuCheck check("prompt_concat_forward");
  check.dims("prompt", prompt, 2);
  check.dims("mask", mask, 2);
  const Sizes n{mask.size(0), mask.size(1), prompt.size(0), prompt.size(1)};
  check.shape("prompt", prompt, {n.prompt, n.hidden});
  check.shape("mask", mask, {n.batch, n.length});
  check.dtype("mask", mask, ScalarType::Long);
  const Dtype type = check.floating(ids.has_value() ? "table" : "embeds", source);
  const Dtype prompt_type = check.floating("prompt", prompt);
  if (ids.has_value()) {
    check.dims("table", source, 2);
    check.shape("table", source, {source.size(0), n.hidden});
    check.shape("ids", *ids, {n.batch, n.length});
    check.dtype("ids", *ids, ScalarType::Long);
    check_ids(check, longs(*ids), n.batch * n.length, source.size(0));
  } else {
    check.shape("embeds", source, {n.batch, n.length, n.hidden});
  }
  if (labels.has_value()) {
    check.shape("labels", *labels, {n.batch, n.length});
    check.dtype("labels", *labels, ScalarType::Long);
  }
  Tensor out = empty(source, {n.batch, n.out(), n.hidden});
  Tensor mask_out = empty(mask, {n.batch, n.out()});
  Tensor positions = empty(mask, {n.batch, n.out()});
  Tensor labels_out = labels.has_value() ? empty(mask, {n.batch, n.out()}) : empty(mask, {0});
  with_dtype(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    Buffer<T> rows(n.prompt * n.hidden);
    with_dtype(prompt_type, [&](auto* p) {
      convert(static_cast<const std::remove_pointer_t<decltype(p)>*>(prompt.const_data_ptr()), n.prompt * n.hidden,
              rows.get());
    });
    const T* from = static_cast<const T*>(source.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t* id = ids.has_value() ? longs(*ids) : nullptr;
    const size_t bytes = static_cast<size_t>(n.hidden) * sizeof(T);
    for_tasks(n.batch * n.out(), n.hidden, [&](int64_t begin, int64_t end) {
      int64_t row = -1, start = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n.out(), j = i % n.out();
        if (b != row) row = b, start = first_one(longs(mask) + b * n.length, n.length);
        const int64_t s = source_row(j, start, n.prompt), flat = b * n.length + s;
        const T* copied = s < 0 ? rows.get() + (j - start) * n.hidden : from + (id ? id[flat] : flat) * n.hidden;
        std::memcpy(to + i * n.hidden, copied, bytes);
      }
    });
  });
  for (int64_t b = 0; b < n.batch; ++b) {
    const int64_t* row = longs(mask) + b * n.length;
    write_row(row, labels.has_value() ? longs(*labels) + b * n.length : nullptr, first_one(row, n.length), n,
              mutable_longs(mask_out) + b * n.out(), mutable_longs(positions) + b * n.out(),
              labels.has_value() ? mutable_longs(labels_out) + b * n.out() : nullptr);
  }
  return {out, mask_out, positions, labels_out};
}

// d_prompt is summed over the batch in order, in f32.
template <class T>
void sum_prompt(const T* dout, const int64_t* mask, const Sizes& n, float* d_prompt) {
  for_tasks(n.prompt, n.batch * n.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* sum = d_prompt + t * n.hidden;
      for (int64_t h = 0; h < n.hidden; ++h) sum[h] = 0.0f;
      for (int64_t b = 0; b < n.batch; ++b) {
        const T* row = dout + (b * n.out() + first_one(mask + b * n.length, n.length) + t) * n.hidden;
        for (int64_t h = 0; h < n.hidden; ++h) sum[h] += to_float(row[h]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> prompt_concat_backward(const Tensor& dout, const Tensor& mask, int64_t prompt_length,
                                                  bool need_embeds) {
  const CpuCheck check("prompt_concat_backward");
  check.dims("dout", dout, 3);
  check.dims("mask", mask, 2);
  check.that(prompt_length >= 0, "T is ", prompt_length, ", want at least 0");
  const Sizes n{mask.size(0), mask.size(1), prompt_length, dout.size(2)};
  check.shape("dout", dout, {n.batch, n.out(), n.hidden});
  check.shape("mask", mask, {n.batch, n.length});
  check.dtype("mask", mask, ScalarType::Long);
  const Dtype type = check.floating("dout", dout);
  Tensor d_prompt = empty_f32(dout, {n.prompt, n.hidden});
  Tensor d_embeds = need_embeds ? empty(dout, {n.batch, n.length, n.hidden}) : empty(dout, {0});
  with_dtype(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* from = static_cast<const T*>(dout.const_data_ptr());
    sum_prompt(from, longs(mask), n, d_prompt.mutable_data_ptr<float>());
    if (!need_embeds) return;
    T* to = static_cast<T*>(d_embeds.mutable_data_ptr());
    for_tasks(n.batch, n.length * n.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t start = first_one(longs(mask) + b * n.length, n.length);
        const T* row = from + b * n.out() * n.hidden;
        T* out = to + b * n.length * n.hidden;
        const size_t before = static_cast<size_t>(start * n.hidden) * sizeof(T);
        const size_t after = static_cast<size_t>((n.length - start) * n.hidden) * sizeof(T);
        std::memcpy(out, row, before);
        std::memcpy(out + start * n.hidden, row + (start + n.prompt) * n.hidden, after);
      }
    });
  });
  return {d_prompt, d_embeds};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_FRAGMENT(peftkern_cpu, m) {
  m.def(
      "prompt_concat_forward(Tensor? ids, Tensor source, Tensor prompt, Tensor mask, Tensor? labels) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("prompt_concat_backward(Tensor dout, Tensor mask, int T, bool need_embeds) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(peftkern_cpu, CPU, m) {
  m.impl("prompt_concat_forward", TORCH_BOX(&peftkern::prompt_concat_forward));
  m.impl("prompt_concat_backward", TORCH_BOX(&peftkern::prompt_concat_backward));
}
