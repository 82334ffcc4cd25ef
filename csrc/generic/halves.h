// One value at a time: the bits of fp32, and fp32 <-> bf16, fp16.
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
