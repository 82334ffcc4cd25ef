// x -> y = norm(x) -> rotation -> q, sx, a token at a time: one read of memory, the rest in L1.
//
//   rms:    n = x * r                    r = 1 / sqrt(mean(x^2) + eps)
//   layer:  n = (x - mean(x)) * r        r = 1 / sqrt(var(x) + eps)
//   y = n * gain + bias, in fp32, rounded once to the dtype of x (before the gain too: round_first)
#pragma once

#include "hadamard.h"
#include "quantize.h"

// Sums of vectors in fp32; they move to fp64 after 64 values each.
constexpr int SUMS = 4;  // independent, to hide the adder's latency
constexpr int64_t SUM_COLUMNS = 64 * SUMS * LANES;

struct VectorSums {
  f32 sum[SUMS];

  TERNC_INLINE VectorSums() {
    for (int i = 0; i < SUMS; ++i) sum[i] = splat_f32(0.0f);
  }
  TERNC_INLINE double total() const {
    return double(sum_lanes(add_f32(add_f32(sum[0], sum[1]), add_f32(sum[2], sum[3]))));
  }
};

// Sum of row[0, padded(columns)) or of its squares.
template <bool SQUARES>
inline double row_sum(const float* row, int64_t columns) {
  double total = 0.0;
  for (int64_t first = 0; first < columns; first += SUM_COLUMNS) {
    const int64_t end = first + SUM_COLUMNS < columns ? first + SUM_COLUMNS : padded(columns);
    VectorSums sums;
    const auto add = [](f32& acc, const float* at) {
      const f32 value = load_f32(at);
      acc = SQUARES ? fma_f32(value, value, acc) : add_f32(acc, value);
    };
    int64_t k = first;
    for (; k + SUMS * LANES <= end; k += SUMS * LANES)
#pragma GCC unroll 4
      for (int i = 0; i < SUMS; ++i) add(sums.sum[i], row + k + i * LANES);
    for (; k < end; k += LANES) add(sums.sum[0], row + k);
    total += sums.total();
  }
  return total;
}

// out = row - shift; past `columns`, 0.
TERNC_NOINLINE void center_row(const float* row, int64_t columns, float shift, float* out) {
  const f32 minus = splat_f32(shift);
  for (int64_t k = 0; k < columns; k += LANES)
    store_f32(out + k, sub_f32(load_f32(row + k), minus));
  for (int64_t k = columns; k < padded(columns); ++k) out[k] = 0.0f;
}

// out = (row * factor) * gain + bias, each rounded; factor 1 changes nothing.
template <bool GAIN, bool BIAS>
TERNC_NOINLINE void affine_row(const float* row, int64_t columns, float factor, const float* gain,
                               const float* bias, const NextRow& next, float* out) {
  const f32 times = splat_f32(factor);
  for (int64_t k = 0; k < columns; k += LANES) {
    next.prefetch(k);
    f32 n = mul_f32(load_f32(row + k), times);
    if constexpr (GAIN) n = mul_f32(n, load_f32(gain + k));
    if constexpr (BIAS) n = add_f32(n, load_f32(bias + k));
    store_f32(out + k, n);
  }
}

// The same, computed where the rotation's first pass reads it.
template <bool BIAS>
struct AffineValues {
  const float *row, *gain, *bias;
  f32 times;
  const NextRow* next;

  TERNC_INLINE f32 operator()(int64_t k) const {
    next->prefetch(k);
    f32 n = mul_f32(mul_f32(load_f32(row + k), times), load_f32(gain + k));
    if constexpr (BIAS) n = add_f32(n, load_f32(bias + k));
    return n;
  }
};

// Gain and bias as the vector loops read them: [padded(K)] or null.
struct Affine {
  const float *gain, *bias;

  void operator()(const float* row, int64_t columns, float factor, const NextRow& next,
                  float* out) const {
    const auto run = gain != nullptr
                         ? bias != nullptr ? affine_row<true, true> : affine_row<true, false>
                     : bias != nullptr ? affine_row<false, true>
                                       : affine_row<false, false>;
    run(row, columns, factor, gain, bias, next, out);
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

// x [K] as float_row() gives it, centered in y [padded(K)] by a layer norm; and its factor.
struct Normed {
  const float* x;
  float factor;

  Normed(const NormArgs& args, const float* row, float* y) : x(row) {
    const int64_t columns = args.columns;
    if (args.kind == Norm::layer) {
      const float mean = float(row_sum<false>(x, columns) / double(columns));
      center_row(x, columns, mean, y);
      x = y;
    }
    const float variance = float(row_sum<true>(x, columns) / double(columns));
    factor = 1.0f / __builtin_sqrtf(variance + args.eps);
  }
};

// x [K] as float_row() gives it -> y [padded(K)] in fp32, rounded to the dtype of x.
inline void norm_row(const NormArgs& args, const Affine& affine, const float* row,
                     const NextRow& next, float* y) {
  const int64_t columns = args.columns;
  const bool halves = args.x.dtype != Dtype::f32;
  const Normed normed(args, row, y);
  const float* x = normed.x;
  const float factor = normed.factor;
  if (halves && args.round_first) {
    affine_row<false, false>(x, columns, factor, nullptr, nullptr, next, y);
    round_values(y, columns, args.x.dtype);
    affine(y, columns, 1.0f, next, y);
  } else {
    affine(x, columns, factor, next, y);
  }
  if (halves) round_values(y, columns, args.x.dtype);
}

// row -> q, sx of a token whose largest |value| is known.
inline void quantize_known(const float* row, int64_t columns, uint32_t top,
                           const QuantizedRows& out, int64_t token) {
  out.scale[token] =
      quantize_row<Dtype::f32>(row, 0, columns, out.bits, top, out.q + token * columns);
}

// row -> rotation, rounded to `dtype` -> q, sx of a token. The row is overwritten.
inline void quantize_rotated(float* row, int64_t columns, const Rotation& rotation, Dtype dtype,
                             const QuantizedRows& out, int64_t token) {
  if (rotation.block > 0) {
    const uint32_t top = rotate_row(PlainValues{row}, rotation, columns, row);
    if (dtype == Dtype::f32 && columns % LANES == 0)
      return quantize_known(row, columns, top, out, token);
    round_values(row, columns, dtype);
  }
  out.scale[token] = quantize_row<Dtype::f32>(row, 0, columns, out.bits, out.q + token * columns);
}

// Whether the gain can be applied where the rotation reads: nobody wants y, and nothing is rounded.
inline bool rotates_at_once(const NormArgs& args, const Affine& affine) {
  return args.y == nullptr && args.x.dtype == Dtype::f32 && affine.gain != nullptr &&
         args.rotation.block >= LANES;
}

// x [K] -> norm -> rotation -> q, sx of a token, y never stored. row: padded(K) floats.
inline void norm_at_once(const NormArgs& args, const Affine& affine, const float* x, int64_t token,
                         float* row) {
  const NextRow next(args.x, token);
  const Normed normed(args, x, row);
  const f32 times = splat_f32(normed.factor);
  const auto rotate = [&](const auto& values) {
    return rotate_row(values, args.rotation, args.columns, row);
  };
  const uint32_t top =
      affine.bias == nullptr
          ? rotate(AffineValues<false>{normed.x, affine.gain, nullptr, times, &next})
          : rotate(AffineValues<true>{normed.x, affine.gain, affine.bias, times, &next});
  quantize_known(row, args.columns, top, args.out, token);
}

inline void norm(const NormArgs& args, int64_t token_begin, int64_t token_end, float* scratch) {
  const int64_t columns = args.columns;
  const Affine affine = {float_columns(args.gain, columns, scratch + padded(columns)),
                         float_columns(args.bias, columns, scratch + 2 * padded(columns))};
  for (int64_t token = token_begin; token < token_end; ++token) {
    const float* x = float_row(args.x, token, columns, scratch);
    if (rotates_at_once(args, affine)) {
      norm_at_once(args, affine, x, token, scratch);
      continue;
    }
    norm_row(args, affine, x, NextRow(args.x, token), scratch);
    if (args.y != nullptr) store_values(scratch, columns, args.x.dtype, args.y, token * columns);
    quantize_rotated(scratch, columns, args.rotation, args.x.dtype, args.out, token);
  }
}
