// Reading, rounding and writing runs of fp32, bf16 and fp16 values.
#pragma once

#include "halves.h"

template <Dtype D>
TERNC_INLINE float load_value(const void* values, int64_t i) {
  if constexpr (D == Dtype::f32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  if constexpr (D == Dtype::bf16) return float_of(uint32_t(bits) << 16);
  return half_to_float(bits);
}

template <Dtype D>
TERNC_INLINE void store_value(void* values, int64_t i, float value) {
  if constexpr (D == Dtype::f32) static_cast<float*>(values)[i] = value;
  if constexpr (D == Dtype::bf16) static_cast<uint16_t*>(values)[i] = float_to_bfloat(value);
  if constexpr (D == Dtype::f16) static_cast<uint16_t*>(values)[i] = float_to_half(value);
}

// LANES values from values[i] on.
template <Dtype D>
TERNC_INLINE f32 load_vector(const void* values, int64_t i) {
  if constexpr (D == Dtype::f32) return load_f32(static_cast<const float*>(values) + i);
  const uint16_t* at = static_cast<const uint16_t*>(values) + i;
  if constexpr (D == Dtype::bf16) return load_bf16(at);
  return load_f16(at);
}

template <Dtype D>
TERNC_INLINE void store_vector(void* values, int64_t i, f32 vector) {
  if constexpr (D == Dtype::f32) store_f32(static_cast<float*>(values) + i, vector);
  if constexpr (D == Dtype::bf16) store_bf16(static_cast<uint16_t*>(values) + i, vector);
  if constexpr (D == Dtype::f16) store_f16(static_cast<uint16_t*>(values) + i, vector);
}

template <Dtype D>
inline void widen_as(const void* values, int64_t begin, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_f32(out + i, load_vector<D>(values, begin + i));
  for (; i < count; ++i) out[i] = load_value<D>(values, begin + i);
}

// values[begin, begin + count) as fp32.
TERNC_NOINLINE void widen_values(const void* values, Dtype dtype, int64_t begin, int64_t count,
                                 float* out) {
  if (dtype == Dtype::f32) widen_as<Dtype::f32>(values, begin, count, out);
  if (dtype == Dtype::bf16) widen_as<Dtype::bf16>(values, begin, count, out);
  if (dtype == Dtype::f16) widen_as<Dtype::f16>(values, begin, count, out);
}

template <Dtype D>
inline void store_as(const float* values, int64_t count, void* out, int64_t begin) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_vector<D>(out, begin + i, load_f32(values + i));
  for (; i < count; ++i) store_value<D>(out, begin + i, values[i]);
}

TERNC_NOINLINE void store_values(const float* values, int64_t count, Dtype dtype, void* out,
                                 int64_t begin) {
  if (dtype == Dtype::f32) store_as<Dtype::f32>(values, count, out, begin);
  if (dtype == Dtype::bf16) store_as<Dtype::bf16>(values, count, out, begin);
  if (dtype == Dtype::f16) store_as<Dtype::f16>(values, count, out, begin);
}

// Each value rounded to `dtype`.
TERNC_NOINLINE void round_values(float* values, int64_t count, Dtype dtype) {
  if (dtype == Dtype::f32) return;
  uint16_t halves[LANES];
  int64_t i = 0;
  for (; dtype == Dtype::bf16 && i + LANES <= count; i += LANES)
    store_f32(values + i, round_bf16(load_f32(values + i)));
  for (; dtype == Dtype::f16 && i + LANES <= count; i += LANES)
    store_f32(values + i, round_f16(load_f32(values + i)));
  store_values(values + i, count - i, dtype, halves, 0);
  widen_values(halves, dtype, 0, count - i, values + i);
}

// Largest |value| as the bits of a float, which order like integers; NaN and infinity on top. The
// last values are looked at once more where they fill no vectors.
template <Dtype D>
inline uint32_t largest_as(const void* values, int64_t begin, int64_t count) {
  constexpr int MAXIMA = 4;
  constexpr int64_t COUNT = MAXIMA * LANES;
  i32 top[MAXIMA];
  for (int j = 0; j < MAXIMA; ++j) top[j] = splat_i32(0);
  const int64_t last = count - COUNT;
  for (int64_t at = 0; last >= 0 && at < count; at += COUNT) {
    const int64_t i = at < last ? at : last;
#pragma GCC unroll 4
    for (int j = 0; j < MAXIMA; ++j)
      top[j] = max_i32(top[j], magnitude_bits(load_vector<D>(values, begin + i + j * LANES)));
  }
  int32_t largest = max_lanes(max_i32(max_i32(top[0], top[1]), max_i32(top[2], top[3])));
  for (int64_t i = 0; last < 0 && i < count; ++i) {
    const int32_t magnitude = int32_t(bits_of(load_value<D>(values, begin + i)) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return uint32_t(largest);
}

TERNC_NOINLINE uint32_t largest(const void* values, Dtype dtype, int64_t begin, int64_t count) {
  if (dtype == Dtype::f32) return largest_as<Dtype::f32>(values, begin, count);
  if (dtype == Dtype::bf16) return largest_as<Dtype::bf16>(values, begin, count);
  return largest_as<Dtype::f16>(values, begin, count);
}

constexpr uint32_t INFINITE = 0x7f800000u;

// Nearest integer, ties to even, for |value| < 2^22: the adder rounds. NaN gives a multiple of 256.
TERNC_INLINE int32_t round_even(float value) {
  return int32_t(bits_of(value + 0x1.8p23f) - bits_of(0x1.8p23f));
}
TERNC_INLINE float round_even_f32(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }
TERNC_INLINE float clamp(float value, float low, float high) {
  value = value > high ? high : value;
  return value < low ? low : value;
}
