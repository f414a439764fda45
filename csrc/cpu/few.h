// low_rank of a few rows, as in decoding: packing a and b would take longer than the products, so both are read once as
// they lie. Read once per instruction set.

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int64_t kFewRows = 4;

// out[rows, n] = in[rows, depth] w[n, depth]^T for w as it lies; in and out are f32 with zeros up to whole vectors.
// then(row, c, sums) gets kLanes sums at a time.
template <class P, class F>
void few_dots(const float* in, int64_t rows, int64_t depth, const P* w, int64_t n, const F& then) {
  const int64_t ld = round_up(depth, kLanes);
  for_tasks(ceil_div(n, kLanes), kLanes * depth * rows, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kLanes; c < end * kLanes; c += kLanes) {
      for (int64_t i = 0; i < rows; ++i) {
        float sums[kLanes] = {};
        for (int j = 0; j < kLanes && c + j < n; j += 4) {
          vf acc[4] = {};
          const P* row[4];
          for (int u = 0; u < 4; ++u) row[u] = w + (c + j + u < n ? c + j + u : n - 1) * depth;
          int64_t t = 0;
          for (; t + kLanes <= depth; t += kLanes) {
            const vf x = load(in + i * ld + t);
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) acc[u] = mac<float>(acc[u], x, load(row[u] + t));
          }
          if (t < depth) {
            const vf x = load(in + i * ld + t);
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) acc[u] = mac<float>(acc[u], x, load_part(row[u] + t, depth - t));
          }
          const v4 four = sum4(acc[0], acc[1], acc[2], acc[3]);
          __builtin_memcpy(sums + j, &four, sizeof four);
        }
        then(i, c, load(sums));
      }
    }
  });
}

// drop(x) / (1 - p) as f32, zeros up to whole vectors.
template <class T>
void few_inputs(const LowRank& op, float* out) {
  Buffer<uint8_t> bits(op.drop.on ? mask_stride(op.k) + kMaskSlack : 0);
  for (int64_t i = 0; i < op.m; ++i) {
    const T* x = op.x.as<const T>() + i * op.x.row;
    if (op.drop.on) {
      const RowKey key = op.key(i);
      keep_bits(&key, 1, 0, op.k, op.drop.threshold, bits.get(), mask_stride(op.k));
    }
    for (int64_t c = 0; c < op.k; c += kLanes) {
      vf value = load_columns(x, c, op.k);
      if (op.drop.on) value = keep(value, lane_bits(bits.get(), c)) * splat(op.drop.inverse_keep);
      store(out, value);
      out += kLanes;
    }
  }
}

template <class T, class P>
void few_rows(const LowRank& op) {
  Buffer<float> x(op.m * round_up(op.k, kLanes)), small(op.m * round_up(op.r, kLanes));
  few_inputs<T>(op, x.get());
  float *h = op.h.as<float>(), *scaled = small.get();
  few_dots(x.get(), op.m, op.k, op.a.as<const P>(), op.r, [&](int64_t i, int64_t c, vf sums) {
    store_columns(h + i * op.r, sums, c, op.r);
    store(scaled + i * round_up(op.r, kLanes) + c, sums * splat(op.scale));
  });
  few_dots(scaled, op.m, op.r, op.b.as<const P>(), op.n, [&](int64_t i, int64_t c, vf value) {
    if (op.base.data) value += load_columns(op.base.as<const T>() + i * op.base.row, c, op.n);
    if (op.column_scale) value *= load_columns(op.column_scale, c, op.n);
    if (op.shift) value += load_columns(op.shift, c, op.n);
    store_columns(op.y.as<T>() + i * op.y.row, value, c, op.n);
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
