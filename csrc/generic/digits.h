// Floating-point tokens as three or four integers each, so that linear_i8 multiplies them:
//
//   split: x -> q, s        x[k] = sum over d of q[d][k] * s[d], s[d] = s[0] * 256^d
//   join:  y = sum over d of product(q[d], W) * s[d], bias and residual as any product has them
//
// fp32 lanes hold a quarter of the columns that byte lanes do, and codes have to be widened for
// them: four byte products cost 0.4 times one in fp32 (one token, 4096 -> 4096, one Zen 5 core).
// Digits hold x[k] to 2^-22 (three) or 2^-31 (four) of the largest value of the token, at most.
// That is as good as floating point where values are of like size. So a token is even, or goes on
// in fp32: of every SPAN columns in a row, and of every SPAN-th column, the largest value is a
// 512th of the token's at least (or all are zero). Halves are exact in three digits then, fp32
// takes four, and three where it is a fourth at least: no value is off by more than 2^-20 of the
// largest around it. That leaves 1.5e-7 of the norm of y for normal values (2.4e-7 for any tried),
// where sums of fp32 (F.linear) lose 2.4e-7, 4.7e-7 and 8.7e-7 of 1024, 4096 and 14336 columns.
// Fewer columns take four digits, since those sums lose less too; a row that reads a few small
// values alone is the one case in which they lose less than three digits.
#pragma once

#include "linear.h"

constexpr int SPAN = 4 * LANES;
constexpr float MOST_UNEVEN = 512.0f, MOST_UNEVEN_IN_THREE = 4.0f;
constexpr int64_t MIN_COLUMNS_IN_THREE = 1024;
constexpr float LARGEST_SPLIT = 0x1p100f, SMALLEST_SPLIT = 0x1p-60f;

// Least of the magnitudes that are not zero, and the largest, of maxima.
struct Extremes {
  int32_t low = int32_t(INFINITE), high = 0;

  TERNC_INLINE void add(int32_t magnitude) {
    high = magnitude > high ? magnitude : high;
    if (magnitude != 0) low = magnitude < low ? magnitude : low;
  }
};

// Digits of a token, or 0.
template <Dtype D>
inline int digits_as(const void* x, int64_t begin, int64_t columns) {
  Extremes extremes;
  i32 lanes[4] = {splat_i32(0), splat_i32(0), splat_i32(0), splat_i32(0)};
  int64_t k = 0;
  for (; k + SPAN <= columns; k += SPAN) {
    i32 span[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      span[i] = magnitude_bits(load_vector<D>(x, begin + k + i * LANES));
      lanes[i] = max_i32(lanes[i], span[i]);
    }
    extremes.add(max_lanes(max_i32(max_i32(span[0], span[1]), max_i32(span[2], span[3]))));
  }
  int32_t every[SPAN];
  for (int i = 0; i < 4; ++i) store_i32(every + i * LANES, lanes[i]);
  for (int i = 0; k < columns; ++i, ++k) {
    const auto magnitude = int32_t(bits_of(load_value<D>(x, begin + k)) & 0x7fffffffu);
    every[i] = magnitude > every[i] ? magnitude : every[i];
  }
  for (const int32_t magnitude : every) extremes.add(magnitude);
  const float high = float_of(uint32_t(extremes.high)), low = float_of(uint32_t(extremes.low));
  if (!(high < LARGEST_SPLIT && high > SMALLEST_SPLIT && high <= MOST_UNEVEN * low)) return 0;
  const bool three = columns >= MIN_COLUMNS_IN_THREE && high <= MOST_UNEVEN_IN_THREE * low;
  return D != Dtype::f32 || three ? 3 : 4;
}

// Of token x[begin, begin + columns).
TERNC_NOINLINE int digits(const void* x, Dtype dtype, int64_t begin, int64_t columns) {
  if (dtype == Dtype::f32) return digits_as<Dtype::f32>(x, begin, columns);
  if (dtype == Dtype::bf16) return digits_as<Dtype::bf16>(x, begin, columns);
  return digits_as<Dtype::f16>(x, begin, columns);
}

// The largest factor of a kind for which no digit of top * factor is over 127: a power of two,
// which is exact, or for three digits of fp32, which need every bit, a number of four bits.
template <Dtype D, int DIGITS>
inline float factor_of(float top) {
  constexpr float MOST = 127.0f * float(1 << (8 * DIGITS - 8));
  constexpr uint32_t BITS = D == Dtype::f32 && DIGITS == 3 ? 0xfff00000u : 0xff800000u;
  return float_of(bits_of(MOST / top) & BITS);
}

// SPAN values times `multiply`, rounded -> their digits, `stride` bytes apart.
template <int DIGITS>
TERNC_INLINE void split_vectors(const f32 (&x)[4], f32 multiply, int8_t* q, int64_t stride) {
  i32 rest[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rest[i] = round_i32(mul_f32(x[i], multiply));
#pragma GCC unroll 4
  for (int d = 0; d < DIGITS; ++d) {
    i32 digit[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      digit[i] = shift_i32_right<24>(shift_i32_left<24>(rest[i]));
      rest[i] = shift_i32_right<8>(sub_i32(rest[i], digit[i]));
    }
    store_i8(q + d * stride, digit);
  }
}

template <Dtype D, int DIGITS>
inline void split_token(const SplitArgs& args, int64_t token) {
  const int64_t columns = args.columns, begin = token * columns;
  int8_t* q = args.q + token * DIGITS * columns;
  const float factor = factor_of<D, DIGITS>(float_of(largest_as<D>(args.x, begin, columns)));
  float* scale = args.scale + token * DIGITS;
  scale[0] = 1.0f / factor;
  for (int d = 1; d < DIGITS; ++d) scale[d] = 256.0f * scale[d - 1];
  const f32 multiply = splat_f32(factor);
  f32 values[4];
  int64_t k = 0;
  for (; k + SPAN <= columns; k += SPAN) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) values[i] = load_vector<D>(args.x, begin + k + i * LANES);
    split_vectors<DIGITS>(values, multiply, q + k, columns);
  }
  if (k == columns) return;
  float last[SPAN] = {};
  int8_t digits[DIGITS][SPAN];
  for (int64_t i = k; i < columns; ++i) last[i - k] = load_value<D>(args.x, begin + i);
  for (int i = 0; i < 4; ++i) values[i] = load_f32(last + i * LANES);
  split_vectors<DIGITS>(values, multiply, digits[0], SPAN);
  for (int d = 0; d < DIGITS; ++d)
    for (int64_t i = k; i < columns; ++i) q[d * columns + i] = digits[d][i - k];
}

// Tokens [token_begin, token_end).
inline void split(const SplitArgs& args, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    if (args.dtype == Dtype::bf16) split_token<Dtype::bf16, 3>(args, token);
    if (args.dtype == Dtype::f16) split_token<Dtype::f16, 3>(args, token);
    if (args.dtype == Dtype::f32 && args.digits == 3) split_token<Dtype::f32, 3>(args, token);
    if (args.dtype == Dtype::f32 && args.digits == 4) split_token<Dtype::f32, 4>(args, token);
  }
}

inline void join(const JoinArgs& args, int64_t token_begin, int64_t token_end) {
  Weight weight = {};
  weight.rows = args.rows;
  weight.scale_kind = ScaleKind::group;  // scales are in the parts already
  const int digits = args.digits;
  RowFactors factors;
  alignas(64) float total[MAX_BLOCK_ROWS] = {};
  for (int64_t first = 0; first < args.rows; first += MAX_BLOCK_ROWS) {
    load_factors(weight, args.out, MAX_BLOCK_ROWS, first / MAX_BLOCK_ROWS, factors);
    for (int64_t t = token_begin; t < token_end; ++t) {
      const float* parts = args.parts + t * digits * args.rows + first;
      for (int64_t r = 0; r < factors.count; ++r) total[r] = parts[r];
      for (int d = 1; d < digits; ++d)
        for (int64_t r = 0; r < factors.count; ++r) total[r] += parts[d * args.rows + r];
      store_outputs(total, 1.0f, factors, weight, args.out, t);
    }
  }
}
