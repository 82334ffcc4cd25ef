// x -> y = norm(x) -> rotation -> q, sx, a token at a time: one read of memory, the rest in L1.
//
//   rms:    n = x * r                    r = 1 / sqrt(mean(x^2) + eps)
//   layer:  n = (x - mean(x)) * r        r = 1 / sqrt(var(x) + eps)
//   y = n * gain + bias, in fp32, rounded once to the dtype of x (before the gain too: round_first)
#pragma once

#include "hadamard.h"
#include "quantize.h"

constexpr int SUMS = 4;  // independent vectors of sums hide the adder's latency
// fp32 sums move to fp64 after this many columns: 64 values to a sum.
constexpr int64_t SUM_COLUMNS = 64 * SUMS * LANES;

// Sum of row[0, padded(columns)) or of its squares.
template <bool SQUARES>
inline double row_sum(const float* row, int64_t columns) {
  double total = 0.0;
  for (int64_t first = 0; first < columns; first += SUM_COLUMNS) {
    const int64_t end = first + SUM_COLUMNS < columns ? first + SUM_COLUMNS : padded(columns);
    f32 sum[SUMS];
    for (int i = 0; i < SUMS; ++i) sum[i] = splat_f32(0.0f);
    const auto add = [&](f32& acc, const float* at) {
      const f32 value = load_f32(at);
      acc = SQUARES ? fma_f32(value, value, acc) : add_f32(acc, value);
    };
    int64_t k = first;
    for (; k + SUMS * LANES <= end; k += SUMS * LANES)
#pragma GCC unroll 4
      for (int i = 0; i < SUMS; ++i) add(sum[i], row + k + i * LANES);
    for (; k < end; k += LANES) add(sum[0], row + k);
    float lanes[SUMS * LANES];
    for (int i = 0; i < SUMS; ++i) store_f32(lanes + i * LANES, sum[i]);
    for (float lane : lanes) total += double(lane);
  }
  return total;
}

// out = ((row - shift) * factor) * gain + bias, each rounded; shift 0 and factor 1 change nothing.
template <bool GAIN, bool BIAS>
TERNC_NOINLINE void affine_row(const float* row, int64_t columns, float shift, float factor,
                               const float* gain, const float* bias, float* out) {
  const f32 minus = splat_f32(shift), times = splat_f32(factor);
  for (int64_t k = 0; k < columns; k += LANES) {
    f32 n = mul_f32(sub_f32(load_f32(row + k), minus), times);
    if constexpr (GAIN) n = mul_f32(n, load_f32(gain + k));
    if constexpr (BIAS) n = add_f32(n, load_f32(bias + k));
    store_f32(out + k, n);
  }
}

// Gain and bias as the vector loops read them: [padded(K)] or null.
struct Affine {
  const float *gain, *bias;

  void operator()(const float* row, int64_t columns, float shift, float factor, float* out) const {
    const auto run = gain != nullptr
                         ? bias != nullptr ? affine_row<true, true> : affine_row<true, false>
                     : bias != nullptr ? affine_row<false, true>
                                       : affine_row<false, false>;
    run(row, columns, shift, factor, gain, bias, out);
  }
};

// A column vector in fp32 with its offset: where it lies if it can be read there, else in scratch.
inline const float* float_columns(const ColumnVector& vector, int64_t columns, float* scratch) {
  if (vector.values == nullptr) return nullptr;
  const float* values = float_row({vector.values, vector.dtype, 0}, 0, columns, scratch);
  if (vector.offset == 0.0f) return values;
  const f32 offset = splat_f32(vector.offset);
  for (int64_t k = 0; k < columns; k += LANES)
    store_f32(scratch + k, add_f32(load_f32(values + k), offset));
  return scratch;
}

// x [K] as float_row() gives it -> y [padded(K)] in fp32, rounded to the dtype of x.
inline void norm_row(const NormArgs& args, const Affine& affine, const float* x, float* y) {
  const int64_t columns = args.columns;
  const bool halves = args.x.dtype != Dtype::f32;
  const Affine identity = {nullptr, nullptr};
  if (args.kind == Norm::layer) {
    const float mean = float(row_sum<false>(x, columns) / double(columns));
    identity(x, columns, mean, 1.0f, y);
    for (int64_t k = columns; k < padded(columns); ++k) y[k] = 0.0f;
    x = y;
  }
  const float variance = float(row_sum<true>(x, columns) / double(columns));
  const float factor = 1.0f / __builtin_sqrtf(variance + args.eps);
  if (halves && args.round_first) {
    identity(x, columns, 0.0f, factor, y);
    round_values(y, columns, args.x.dtype);
    affine(y, columns, 0.0f, 1.0f, y);
  } else {
    affine(x, columns, 0.0f, factor, y);
  }
  if (halves) round_values(y, columns, args.x.dtype);
}

// row -> rotation, rounded to `dtype` -> q, sx of a token. The row is overwritten.
inline void quantize_rotated(float* row, int64_t columns, const Rotation& rotation, Dtype dtype,
                             const QuantizedRows& out, int64_t token) {
  if (rotation.block > 0) {
    rotate_row(row, rotation, columns, row);
    round_values(row, columns, dtype);
  }
  out.scale[token] = quantize_row<Dtype::f32>(row, 0, columns, out.bits, out.q + token * columns);
}

inline void norm(const NormArgs& args, int64_t token_begin, int64_t token_end, float* scratch) {
  const int64_t columns = args.columns;
  const Affine affine = {float_columns(args.gain, columns, scratch + padded(columns)),
                         float_columns(args.bias, columns, scratch + 2 * padded(columns))};
  for (int64_t token = token_begin; token < token_end; ++token) {
    norm_row(args, affine, float_row(args.x, token, columns, scratch), scratch);
    if (args.y != nullptr) store_values(scratch, columns, args.x.dtype, args.y, token * columns);
    quantize_rotated(scratch, columns, args.rotation, args.x.dtype, args.out, token);
  }
}
