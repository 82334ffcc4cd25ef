// Reading and writing fp32, bf16 and fp16 values; plain loops that the compiler vectorises.
#pragma once

TERNC_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
TERNC_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// fp16 -> fp32, exact: the exponent is rebased by one multiplication, which also normalises
// subnormal numbers.
TERNC_INLINE float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | magnitude << 13;
  return float_of((magnitude >= 0x7c00u ? special : finite) | sign);
}

// fp32 -> fp16, round half to even.
TERNC_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  // Normal result: rebias, add half of the dropped part, ties to the even neighbour.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  // Subnormal result: adding 0.5 makes the float adder round at 2^-24.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return uint16_t((magnitude >= (143u << 23) ? special : finite) | sign);
}

// fp32 -> bf16, round half to even.
TERNC_INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <Dtype D>
TERNC_INLINE float load_value(const void* values, int64_t i) {
  if constexpr (D == Dtype::f32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  if constexpr (D == Dtype::bf16) return float_of(uint32_t(bits) << 16);
  return half_to_float(bits);
}

template <Dtype D>
inline void widen_as(const void* values, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load_value<D>(values, begin + i);
}

// values[begin, begin + count) as fp32.
TERNC_NOINLINE void widen_values(const void* values, Dtype dtype, int64_t begin, int64_t count,
                                 float* out) {
  if (dtype == Dtype::f32) widen_as<Dtype::f32>(values, begin, count, out);
  if (dtype == Dtype::bf16) widen_as<Dtype::bf16>(values, begin, count, out);
  if (dtype == Dtype::f16) widen_as<Dtype::f16>(values, begin, count, out);
}

TERNC_NOINLINE void store_values(const float* values, int64_t count, Dtype dtype, void* out,
                                 int64_t begin) {
  if (dtype == Dtype::f32)
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[begin + i] = values[i];
  uint16_t* halves = static_cast<uint16_t*>(out);
  if (dtype == Dtype::bf16)
    for (int64_t i = 0; i < count; ++i) halves[begin + i] = float_to_bfloat(values[i]);
  if (dtype == Dtype::f16)
    for (int64_t i = 0; i < count; ++i) halves[begin + i] = float_to_half(values[i]);
}

// Each value rounded to `dtype`.
TERNC_NOINLINE void round_values(float* values, int64_t count, Dtype dtype) {
  if (dtype == Dtype::bf16)
    for (int64_t i = 0; i < count; ++i)
      values[i] = float_of(uint32_t(float_to_bfloat(values[i])) << 16);
  if (dtype == Dtype::f16)
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(float_to_half(values[i]));
}

// Largest |value| as the bits of a float, which order like integers; NaN and infinity on top.
template <Dtype D>
inline uint32_t largest_as(const void* values, int64_t begin, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
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
