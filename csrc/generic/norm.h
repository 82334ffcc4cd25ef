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

inline void affine(const NormArgs& args, const float* row, float shift, float factor, float* out) {
  const auto run = args.gain != nullptr
                       ? args.bias != nullptr ? affine_row<true, true> : affine_row<true, false>
                   : args.bias != nullptr ? affine_row<false, true>
                                          : affine_row<false, false>;
  run(row, args.columns, shift, factor, args.gain, args.bias, out);
}

// x [K] as float_row() gives it -> y [padded(K)] in fp32, rounded to the dtype of x.
inline void norm_row(const NormArgs& args, const float* x, float* y) {
  const int64_t columns = args.columns;
  float mean = 0.0f;
  if (args.kind == Norm::layer) {
    mean = float(row_sum<false>(x, columns) / double(columns));
    affine_row<false, false>(x, columns, mean, 1.0f, nullptr, nullptr, y);
    for (int64_t k = columns; k < padded(columns); ++k) y[k] = 0.0f;
    x = y;
  }
  const float variance = float(row_sum<true>(x, columns) / double(columns));
  const float factor = 1.0f / __builtin_sqrtf(variance + args.eps);
  const bool halves = args.x.dtype != Dtype::f32;
  if (halves && args.round_first) {
    affine_row<false, false>(x, columns, 0.0f, factor, nullptr, nullptr, y);
    round_values(y, columns, args.x.dtype);
    affine(args, y, 0.0f, 1.0f, y);
  } else {
    affine(args, x, 0.0f, factor, y);
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
  for (int64_t token = token_begin; token < token_end; ++token) {
    norm_row(args, float_row(args.x, token, args.columns, scratch), scratch);
    if (args.y != nullptr)
      store_values(scratch, args.columns, args.x.dtype, args.y, token * args.columns);
    quantize_rotated(scratch, args.columns, args.rotation, args.x.dtype, args.out, token);
  }
}
