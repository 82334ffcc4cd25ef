// x -> y = norm(x) -> rotation -> q, sx, a token at a time: one read of memory, the rest in L1.
//
//   rms:    n = x * r                    r = 1 / sqrt(mean(x^2) + eps)
//   layer:  n = (x - mean(x)) * r        r = 1 / sqrt(var(x) + eps)
//   y = n * gain + bias, in fp32, rounded once to the dtype of x (before the gain too: round_first)
#pragma once

#include "hadamard.h"
#include "quantize.h"

// Sums of vectors in fp32; they move to fp64 after 64 values each.
constexpr int SUMS = 8;  // independent, to hide the adder's latency
constexpr int64_t SUM_COLUMNS = 64 * SUMS * LANES;

struct VectorSums {
  f32 sum[SUMS];

  TERNC_INLINE VectorSums() {
    for (int i = 0; i < SUMS; ++i) sum[i] = splat_f32(0.0f);
  }
  TERNC_INLINE double total() const {
    f32 pairs[SUMS / 2];
#pragma GCC unroll 4
    for (int i = 0; i < SUMS / 2; ++i) pairs[i] = add_f32(sum[i], sum[i + SUMS / 2]);
    return double(sum_lanes(add_f32(add_f32(pairs[0], pairs[1]), add_f32(pairs[2], pairs[3]))));
  }
};

// Sum of row[0, padded(columns)), or of the squares of its distances from `mean` (RMS: 0).
template <bool SQUARES, bool CENTER>
TERNC_NOINLINE double row_sum(const float* row, int64_t columns, float mean) {
  const f32 center = splat_f32(mean);
  double total = 0.0;
  for (int64_t first = 0; first < columns; first += SUM_COLUMNS) {
    const int64_t end = first + SUM_COLUMNS < columns ? first + SUM_COLUMNS : padded(columns);
    VectorSums sums;
    const auto add = [&](f32& acc, const float* at) {
      const f32 value = CENTER ? sub_f32(load_f32(at), center) : load_f32(at);
      acc = SQUARES ? fma_f32(value, value, acc) : add_f32(acc, value);
    };
    int64_t k = first;
    for (; k + SUMS * LANES <= end; k += SUMS * LANES)
#pragma GCC unroll 8
      for (int i = 0; i < SUMS; ++i) add(sums.sum[i], row + k + i * LANES);
    for (; k < end; k += LANES) add(sums.sum[0], row + k);
    total += sums.total();
  }
  return total;
}

// What a norm subtracts (RMS: nothing) and multiplies by.
struct Moments {
  float mean, factor;
};

// 1 / sqrt(mean of squares + eps). Squares of very large or small values leave the range of fp32:
// their sum is made anew in fp64.
inline float factor_of(const NormArgs& args, const float* x, float mean, double sum) {
  constexpr float LARGE = 0x1p100f, SMALL = 0x1p-100f;
  const double count = double(args.columns);
  const float square = float(sum / count) + args.eps;
  if (square < LARGE && square > SMALL) return 1.0f / __builtin_sqrtf(square);
  double exact = 0.0;
  for (int64_t k = 0; k < args.columns; ++k) {
    const double distance = double(x[k] - mean);
    exact += distance * distance;
  }
  return float(1.0 / __builtin_sqrt(exact / count + double(args.eps)));
}

// Sums of very large values leave the range of fp32 too.
inline float mean_of(const float* x, int64_t columns) {
  double sum = row_sum<false, false>(x, columns, 0.0f);
  if (!__builtin_isfinite(sum)) {
    sum = 0.0;
    for (int64_t k = 0; k < columns; ++k) sum += double(x[k]);
  }
  return float(sum / double(columns));
}

// Of x as float_row() gives it. What is behind its columns, in scratch, gets the mean too.
inline Moments moments_of(const NormArgs& args, const float* x, float* scratch) {
  const int64_t columns = args.columns;
  if (args.kind == Norm::rms)
    return {0.0f, factor_of(args, x, 0.0f, row_sum<true, false>(x, columns, 0.0f))};
  const float mean = mean_of(x, columns);
  for (int64_t k = columns; k < padded(columns); ++k) scratch[k] = mean;
  return {mean, factor_of(args, x, mean, row_sum<true, true>(x, columns, mean))};
}

// Gain and bias as the vector loops read them: [padded(K)] or null.
struct Affine {
  const float *gain, *bias;
};

// ((row - mean) * factor) * gain + bias, each rounded.
template <bool CENTER, bool GAIN, bool BIAS>
struct AffineValues {
  const float* row;
  Affine affine;
  f32 mean, factor;

  AffineValues(const float* x, const Affine& gain_and_bias, const Moments& moments)
      : row(x),
        affine(gain_and_bias),
        mean(splat_f32(moments.mean)),
        factor(splat_f32(moments.factor)) {}

  TERNC_INLINE f32 operator()(int64_t k, int) const {
    f32 n = load_f32(row + k);
    if constexpr (CENTER) n = sub_f32(n, mean);
    n = mul_f32(n, factor);
    if constexpr (GAIN) n = mul_f32(n, load_f32(affine.gain + k));
    if constexpr (BIAS) n = add_f32(n, load_f32(affine.bias + k));
    return n;
  }
  TERNC_INLINE void finish() const {}
};

template <bool CENTER, bool GAIN, bool BIAS>
TERNC_NOINLINE void affine_as(const float* row, int64_t columns, const Affine& affine,
                              const Moments& moments, const NextRow& next, float* out) {
  const AffineValues<CENTER, GAIN, BIAS> values(row, affine, moments);
  for (int64_t k = 0; k < columns; k += LANES) {
    next.prefetch(k);
    store_f32(out + k, values(k, 0));
  }
}

// row -> out [padded(K)], which may be the row.
template <bool CENTER>
inline void affine_row(const float* row, int64_t columns, const Affine& affine,
                       const Moments& moments, const NextRow& next, float* out) {
  const bool gain = affine.gain != nullptr, bias = affine.bias != nullptr;
  const auto run = gain   ? bias ? affine_as<CENTER, true, true> : affine_as<CENTER, true, false>
                   : bias ? affine_as<CENTER, false, true>
                          : affine_as<CENTER, false, false>;
  run(row, columns, affine, moments, next, out);
}

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
inline void norm_row(const NormArgs& args, const Affine& affine, const float* x,
                     const NextRow& next, float* y) {
  const int64_t columns = args.columns;
  const bool halves = args.x.dtype != Dtype::f32;
  const Moments moments = moments_of(args, x, y);
  const auto run = args.kind == Norm::rms ? affine_row<false> : affine_row<true>;
  if (halves && args.round_first) {
    run(x, columns, {nullptr, nullptr}, moments, next, y);
    round_values(y, columns, args.x.dtype);
    affine_row<false>(y, columns, affine, {0.0f, 1.0f}, next, y);
  } else {
    run(x, columns, affine, moments, next, y);
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
    const uint32_t top =
        rotate_row(PlainValues{row}, rotation, rotation_factor(rotation), columns, row);
    if (dtype == Dtype::f32 && columns % LANES == 0)
      return quantize_known(row, columns, top, out, token);
    round_values(row, columns, dtype);
  }
  out.scale[token] = quantize_row<Dtype::f32>(row, 0, columns, out.bits, out.q + token * columns);
}

// Whether norm, gain and bias can be applied where the rotation reads: x lies in fp32, nobody wants
// y, and gain and bias are those that such norms have.
inline bool rotates_at_once(const NormArgs& args, const Affine& affine) {
  return args.y == nullptr && args.x.dtype == Dtype::f32 && args.columns % ROW_ALIGN == 0 &&
         args.rotation.block >= LANES && affine.gain != nullptr &&
         (affine.bias != nullptr) == (args.kind == Norm::layer);
}

// vector [K] times the signs, in scratch.
inline const float* with_signs(const float* vector, const int8_t* signs, int64_t columns,
                               float* scratch) {
  if (vector == nullptr) return nullptr;
  for (int64_t k = 0; k < columns; k += LANES)
    store_f32(scratch + k, with_sign(load_f32(vector + k), signs + k));
  return scratch;
}

// The same values of the row that is prefetched, when this one is read.
template <class Values>
struct ThenNext {
  static constexpr bool SCALED = false;
  Values values;
  const float* next;

  TERNC_INLINE f32 operator()(int64_t k, int i) {
    __builtin_prefetch(next + k, 0, 2);
    return values(k, i);
  }
  TERNC_INLINE void finish() { values.finish(); }
};

// row * gain; the squares of the row are added up on the way, at most MAX_HADAMARD / LANES in fp32.
struct SquaredValues {
  const float *row, *gain;
  double* square;
  f32 sum[4];

  SquaredValues(const float* x, const float* factors, double* total)
      : row(x), gain(factors), square(total) {
    for (f32& part : sum) part = splat_f32(0.0f);
  }
  TERNC_INLINE f32 operator()(int64_t k, int i) {
    const f32 x = load_f32(row + k);
    sum[i % 4] = fma_f32(x, x, sum[i % 4]);
    return mul_f32(x, load_f32(gain + k));
  }
  TERNC_INLINE void finish() {
    *square += double(sum_lanes(add_f32(add_f32(sum[0], sum[1]), add_f32(sum[2], sum[3]))));
  }
};

// A token on its way through norm and rotation at once.
struct AtOnce {
  uint32_t top;  // the largest |value| as bits
  float factor;  // what the rotated values still lack
};

// A factor of all values scales the step and leaves the integers, so it may come last. Not where
// values are so large or small without it that sums of them might not be finite, or exact.
inline bool scales_last(float size) {
  constexpr float LARGE = 0x1p60f, SMALL = 0x1p-60f;
  return size < LARGE && size > SMALL;
}

// factor: of the rotation.
template <bool LAYER>
inline AtOnce rotate_normed(const NormArgs& args, const Affine& affine, const Rotation& rotation,
                            float factor, const float* x, const float* next, const Moments& moments,
                            float* row) {
  using Values = AffineValues<LAYER, true, LAYER>;
  const ThenNext<Values> values = {{x, affine, moments}, next};
  const uint32_t top = rotate_row(values, rotation, 1.0f, args.columns, row);
  if (scales_last(float_of(top))) return {top, factor};
  for (int64_t k = 0; k < args.columns; ++k) row[k] *= factor;
  return {largest_as<Dtype::f32>(row, 0, args.columns), 1.0f};
}

// RMS alone, whose factor comes last too.
inline AtOnce rotate_squared(const NormArgs& args, const Affine& affine, const Rotation& rotation,
                             float factor, const float* x, const float* next, float* row) {
  double square = 0.0;
  const ThenNext<SquaredValues> values = {{x, affine.gain, &square}, next};
  const uint32_t top = rotate_row(values, rotation, 1.0f, args.columns, row);
  const float mean = float(square / double(args.columns)) + args.eps;
  if (scales_last(mean) && scales_last(float_of(top)))
    return {top, factor * (1.0f / __builtin_sqrtf(mean))};
  const Moments moments = moments_of(args, x, nullptr);
  return rotate_normed<false>(args, affine, rotation, factor, x, next, moments, row);
}

// Columns from which on it is faster to add up squares in the rotation than before it.
constexpr int64_t MIN_SQUARED_COLUMNS = 2048;

// x -> norm -> rotation -> q, sx of some tokens, y never stored. They take every step together: no
// row waits for its sums, roots and divisions.
template <bool LAYER>
inline void norm_at_once(const NormArgs& args, const Affine& affine, const Rotation& rotation,
                         int64_t token, int64_t count, float* scratch) {
  const int64_t columns = args.columns, stride = args.x.stride;
  const float* x = static_cast<const float*>(args.x.values) + token * stride;
  const bool squares = !LAYER && columns >= MIN_SQUARED_COLUMNS;
  const float factor = rotation_factor(rotation);
  Moments moments[GROUP_TOKENS];
  AtOnce rows[GROUP_TOKENS];
  for (int64_t i = 0; i < count && !squares; ++i)
    moments[i] = moments_of(args, x + i * stride, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const float *at = x + i * stride, *next = at + count * stride;
    float* row = scratch + i * columns;
    rows[i] = squares
                  ? rotate_squared(args, affine, rotation, factor, at, next, row)
                  : rotate_normed<LAYER>(args, affine, rotation, factor, at, next, moments[i], row);
  }
  for (int64_t i = 0; i < count; ++i) {
    quantize_known(scratch + i * columns, columns, rows[i].top, args.out, token + i);
    args.out.scale[token + i] *= rows[i].factor;
  }
}

inline void norm(const NormArgs& args, int64_t token_begin, int64_t token_end, float* scratch) {
  const int64_t columns = args.columns;
  float *gain = scratch, *bias = gain + padded(columns), *rows = bias + padded(columns);
  Affine affine = {float_columns(args.gain, columns, gain),
                   float_columns(args.bias, columns, bias)};
  if (!rotates_at_once(args, affine)) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      const float* x = float_row(args.x, token, columns, rows);
      norm_row(args, affine, x, NextRow(args.x, token), rows);
      if (args.y != nullptr) store_values(rows, columns, args.x.dtype, args.y, token * columns);
      quantize_rotated(rows, columns, args.rotation, args.x.dtype, args.out, token);
    }
    return;
  }
  Rotation rotation = args.rotation;
  if (rotation.signs != nullptr && token_end - token_begin > 1) {
    affine.gain = with_signs(affine.gain, rotation.signs, columns, gain);
    affine.bias = with_signs(affine.bias, rotation.signs, columns, bias);
    rotation.signs = nullptr;
  }
  const int64_t group = group_tokens(columns);
  for (int64_t token = token_begin; token < token_end; token += group) {
    const int64_t left = token_end - token, count = left < group ? left : group;
    (args.kind == Norm::rms ? norm_at_once<false> : norm_at_once<true>)(args, affine, rotation,
                                                                        token, count, rows);
  }
}
