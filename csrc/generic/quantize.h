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

// top: the largest |x| as bits.
template <Dtype D>
inline Grid token_grid(const void* x, int64_t begin, int64_t columns, int bits, uint32_t top) {
  if (top >= INFINITE) return NOT_FINITE;
  const bool wide = bits == 8;
  const float size =
      wide ? float_of(top) : float(absolute_sum<D>(x, begin, columns) / double(columns));
  const float numerator = wide ? 127.0f : SQRT_7, multiply = numerator / size;
  if (columns == 0 || bits_of(multiply) >= INFINITE) return ZERO;
  return {multiply, wide ? -127.0f : -8.0f, wide ? 127.0f : 7.0f, size / numerator};
}

// x[begin, begin + columns) * multiply, rounded and clamped; the last columns once more where they
// fill no vectors. 8 bits need no clamping: |x| * (127 / max|x|) rounds to 127 at most.
template <Dtype D, bool CLAMP>
TERNC_NOINLINE void round_row(const void* x, int64_t begin, int64_t columns, const Grid& grid,
                              int8_t* q) {
  const f32 multiply = splat_f32(grid.multiply), low = splat_f32(grid.low);
  const f32 high = splat_f32(grid.high);
  constexpr int64_t COUNT = 4 * LANES;
  const int64_t last = columns - COUNT;
  for (int64_t at = 0; last >= 0 && at < columns; at += COUNT) {
    const int64_t k = at < last ? at : last;
    i32 codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      f32 scaled = mul_f32(load_vector<D>(x, begin + k + i * LANES), multiply);
      if constexpr (CLAMP) scaled = max_f32(low, min_f32(high, scaled));
      codes[i] = round_i32(scaled);
    }
    store_i8(q + k, codes);
  }
  for (int64_t k = 0; last < 0 && k < columns; ++k)
    q[k] =
        int8_t(round_even(clamp(load_value<D>(x, begin + k) * grid.multiply, grid.low, grid.high)));
}

// x[begin, begin + columns) -> q, and its scale. top: the largest |x| as bits.
template <Dtype D>
inline float quantize_row(const void* x, int64_t begin, int64_t columns, int bits, uint32_t top,
                          int8_t* q) {
  const Grid grid = token_grid<D>(x, begin, columns, bits, top);
  if (grid.multiply == 0.0f) {
    for (int64_t k = 0; k < columns; ++k) q[k] = 0;  // no memset: q is null where columns is 0
    return grid.scale;
  }
  (bits == 8 ? round_row<D, false> : round_row<D, true>)(x, begin, columns, grid, q);
  return grid.scale;
}

// Sum of q[0, count).
inline int32_t sum_bytes(const int8_t* q, int64_t count) {
  constexpr int STEP = LANES * STEP_COLUMNS;
  i32 vector = splat_i32(0);
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) vector = dot(vector, splat_byte(1), load_bytes(q + k));
  int32_t lanes[LANES], sum = 0;
  store_i32(lanes, vector);
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  for (; k < count; ++k) sum += q[k];
  return sum;
}

inline void sum_groups(const Tokens& tokens, int64_t columns, int64_t group_size, int64_t groups,
                       int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group_size, left = columns - first;
      tokens.sums[token * groups + g] = sum_bytes(tokens.q + token * tokens.stride + first,
                                                  left < group_size ? left : group_size);
    }
}

template <Dtype D>
inline float quantize_row(const void* x, int64_t begin, int64_t columns, int bits, int8_t* q) {
  return quantize_row<D>(x, begin, columns, bits, largest_as<D>(x, begin, columns), q);
}

// Tokens [token_begin, token_end) of x.
inline void quantize(const QuantizeArgs& args, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t begin = token * args.columns;
    int8_t* q = args.out.q + token * args.out.stride;
    float& scale = args.out.scale[token];
    if (args.dtype == Dtype::f32)
      scale = quantize_row<Dtype::f32>(args.x, begin, args.columns, args.bits, q);
    if (args.dtype == Dtype::bf16)
      scale = quantize_row<Dtype::bf16>(args.x, begin, args.columns, args.bits, q);
    if (args.dtype == Dtype::f16)
      scale = quantize_row<Dtype::f16>(args.x, begin, args.columns, args.bits, q);
    for (int64_t k = args.columns; k < args.out.stride; ++k) q[k] = 0;
    if (args.out.sums != nullptr)
      sum_groups(args.out, args.columns, args.group_size, args.groups, token, token + 1);
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
