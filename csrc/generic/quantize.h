// x -> q int8, sx, sums: per-token quantisation of activations.
//
//   8 bits: q = clamp(round_half_even(x * (127 / max|x|)), -127, 127)     sx = max|x| / 127
//   4 bits: q = clamp(round_half_even(x * (sqrt 7 / mean|x|)), -8, 7)     sx = mean|x| / sqrt 7
//
// True divisions, no contraction, in fp32; mean|x| is summed in fp64 and rounded once. A token
// whose first quotient is infinite (all zero, or under about 4e-37) counts as zero: q = 0, sx = 0.
// One with NaN or infinity has q = 0, sx = NaN.
#pragma once

#include "values.h"

constexpr float SQRT_7 = 2.6457513110645906f;

constexpr float NAN_F32 = __builtin_nanf("");

struct Grid {
  float multiply, low, high, scale;  // multiply = 0: every q is 0
};
constexpr Grid NOT_FINITE = {0.0f, 0.0f, 0.0f, NAN_F32};
constexpr Grid ZERO = {0.0f, 0.0f, 0.0f, 0.0f};

// Sum of |x| in eight fixed partial sums, so that every instruction set gives the same bits.
template <Dtype D>
inline double absolute_sum(const void* x, int64_t begin, int64_t columns) {
  double partial[8] = {};
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8)
    for (int i = 0; i < 8; ++i)
      partial[i] += double(float_of(bits_of(load_value<D>(x, begin + k + i)) & 0x7fffffffu));
  for (int i = 0; k + i < columns; ++i)
    partial[i] += double(float_of(bits_of(load_value<D>(x, begin + k + i)) & 0x7fffffffu));
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

template <Dtype D>
inline Grid token_grid(const void* x, int64_t begin, int64_t columns, int bits) {
  const uint32_t top = largest_as<D>(x, begin, columns);
  if (top >= INFINITE) return NOT_FINITE;
  const bool wide = bits == 8;
  const float size =
      wide ? float_of(top) : float(absolute_sum<D>(x, begin, columns) / double(columns));
  const float numerator = wide ? 127.0f : SQRT_7, multiply = numerator / size;
  if (columns == 0 || bits_of(multiply) >= INFINITE) return ZERO;
  return {multiply, wide ? -127.0f : -8.0f, wide ? 127.0f : 7.0f, size / numerator};
}

template <Dtype D>
inline void quantize_token(const QuantizeArgs& args, int64_t token) {
  const int64_t columns = args.columns, begin = token * columns;
  int8_t* q = args.out.q + token * args.out.stride;
  const Grid grid = token_grid<D>(args.x, begin, columns, args.bits);
  args.out.scale[token] = grid.scale;
  if (grid.multiply == 0.0f) {
    __builtin_memset(q, 0, size_t(columns));
  } else {
    for (int64_t k = 0; k < columns; ++k)
      q[k] = int8_t(
          round_even(clamp(load_value<D>(args.x, begin + k) * grid.multiply, grid.low, grid.high)));
  }
  for (int64_t k = columns; k < args.out.stride; ++k) q[k] = 0;
  for (int64_t g = 0; args.out.sums != nullptr && g < args.groups; ++g) {
    const int64_t first = g * args.group_size;
    const int64_t last = first + args.group_size < columns ? first + args.group_size : columns;
    int32_t sum = 0;
    for (int64_t k = first; k < last; ++k) sum += q[k];
    args.out.sums[token * args.groups + g] = sum;
  }
}

// Tokens [token_begin, token_end) of x.
inline void quantize(const QuantizeArgs& args, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    if (args.dtype == Dtype::f32) quantize_token<Dtype::f32>(args, token);
    if (args.dtype == Dtype::bf16) quantize_token<Dtype::bf16>(args, token);
    if (args.dtype == Dtype::f16) quantize_token<Dtype::f16>(args, token);
  }
}

// Tokens [token_begin, token_end) of x [M, columns] as fp32 [M, stride]; columns past K hold 0. A
// token with NaN or infinity is NaN throughout, so that its outputs are.
inline void widen(const void* x, Dtype dtype, int64_t columns, float* out, int64_t stride,
                  int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    float* row = out + token * stride;
    const bool finite = largest(x, dtype, token * columns, columns) < INFINITE;
    widen_values(x, dtype, token * columns, columns, row);
    for (int64_t k = finite ? columns : 0; k < stride; ++k) row[k] = finite ? 0.0f : NAN_F32;
  }
}
