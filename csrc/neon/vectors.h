// The simd vocabulary in NEON, all but dot() and what it takes: four lanes of 32 bits. Included
// inside the namespace of an instruction set, by its simd.h.
constexpr int LANES = 4;
constexpr int ACCUMULATORS = 16;  // of 32 registers
constexpr bool FUSES_BUTTERFLIES = false;

using bytes = uint8x16_t;
using i32 = int32x4_t;
using f32 = float32x4_t;

TERNC_INLINE bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
TERNC_INLINE uint32_t load_word(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
TERNC_INLINE bytes splat_word(const void* p) {
  return vreinterpretq_u8_u32(vdupq_n_u32(load_word(p)));
}
TERNC_INLINE bytes splat_byte(uint8_t b) { return vdupq_n_u8(b); }
TERNC_INLINE bytes and_bytes(bytes a, bytes b) { return vandq_u8(a, b); }
TERNC_INLINE bytes or_bytes(bytes a, bytes b) { return vorrq_u8(a, b); }
TERNC_INLINE bytes sub_bytes(bytes a, bytes b) { return vsubq_u8(a, b); }
template <int S>
TERNC_INLINE bytes shift_bytes_right(bytes a) {
  return vshrq_n_u8(a, S);
}
template <int S>
TERNC_INLINE bytes shift_bytes_left(bytes a) {
  return vshlq_n_u8(a, S);
}

TERNC_INLINE i32 splat_i32(int32_t a) { return vdupq_n_s32(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) { return vld1q_s32(p); }
// Four bytes, in the lower half of eight.
TERNC_INLINE uint8x8_t load_four(const void* p) { return vcreate_u8(load_word(p)); }
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) {
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four(p)))));
}
TERNC_INLINE void store_i32(int32_t* p, i32 a) { vst1q_s32(p, a); }
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return vaddq_s32(a, b); }
TERNC_INLINE i32 sub_i32(i32 a, i32 b) { return vsubq_s32(a, b); }
TERNC_INLINE i32 mul_i32(i32 a, i32 b) { return vmulq_s32(a, b); }
template <int S>
TERNC_INLINE i32 shift_i32_left(i32 a) {
  return vshlq_n_s32(a, S);
}
template <int S>
TERNC_INLINE i32 shift_i32_right(i32 a) {  // arithmetic; NEON has no right shift by 0
  if constexpr (S == 0)
    return a;
  else
    return vshrq_n_s32(a, S);
}

TERNC_INLINE f32 splat_f32(float a) { return vdupq_n_f32(a); }
TERNC_INLINE f32 load_f32(const float* p) { return vld1q_f32(p); }
TERNC_INLINE void store_f32(float* p, f32 a) { vst1q_f32(p, a); }
TERNC_INLINE f32 add_f32(f32 a, f32 b) { return vaddq_f32(a, b); }
TERNC_INLINE f32 mul_f32(f32 a, f32 b) { return vmulq_f32(a, b); }
TERNC_INLINE f32 fma_f32(f32 a, f32 b, f32 acc) { return vfmaq_f32(acc, a, b); }
TERNC_INLINE f32 to_f32(i32 a) { return vcvtq_f32_s32(a); }
// Signed byte J of every lane.
template <int J>
TERNC_INLINE f32 byte_f32(bytes a) {
  return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u8(a), 24 - 8 * J), 24));
}

// Halves, 16 bits each.
TERNC_INLINE f32 load_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
TERNC_INLINE f32 load_f16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
// The bits of a rounded to bf16, half to even; the lower 16 are left over. NaN stays NaN.
TERNC_INLINE uint32x4_t bf16_bits(f32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000));
}
TERNC_INLINE void store_bf16(uint16_t* p, f32 a) { vst1_u16(p, vshrn_n_u32(bf16_bits(a), 16)); }
TERNC_INLINE f32 round_bf16(f32 a) {
  return vreinterpretq_f32_u32(vandq_u32(bf16_bits(a), vdupq_n_u32(0xffff0000)));
}
TERNC_INLINE void store_f16(uint16_t* p, f32 a) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
TERNC_INLINE f32 round_f16(f32 a) { return vcvt_f32_f16(vcvt_f16_f32(a)); }

TERNC_INLINE i32 max_i32(i32 a, i32 b) { return vmaxq_s32(a, b); }
TERNC_INLINE i32 magnitude_bits(f32 a) { return vreinterpretq_s32_f32(vabsq_f32(a)); }
TERNC_INLINE f32 larger_magnitude(f32 a, f32 b) {  // of magnitudes
  return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}
constexpr bool TAKES_MAGNITUDES = false;
// Nearest integer, half to even.
TERNC_INLINE i32 round_i32(f32 a) { return vcvtnq_s32_f32(a); }
// Four vectors of integers that fit int8, one after the other.
TERNC_INLINE void store_i8(int8_t* p, const i32 (&a)[4]) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a[0]), vmovn_s32(a[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a[2]), vmovn_s32(a[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) {
  return vbslq_f32(vcltq_f32(a, b), x, y);
}
// b where a or b is NaN: the instructions of that name give NaN, or the other.
TERNC_INLINE f32 min_f32(f32 a, f32 b) { return select_less(a, b, a, b); }
TERNC_INLINE f32 max_f32(f32 a, f32 b) { return select_less(b, a, a, b); }
TERNC_INLINE f32 abs_f32(f32 a) { return vabsq_f32(a); }
// |size| with the sign of a.
TERNC_INLINE f32 copy_sign(f32 size, f32 a) { return vbslq_f32(vdupq_n_u32(0x80000000), a, size); }
TERNC_INLINE f32 reciprocal(f32 a) { return vdivq_f32(vdupq_n_f32(1.0f), a); }
// a * 2^n for an integer n from -126 to 128, in two factors: 2^128 is too much for one.
TERNC_INLINE f32 times_power_of_two(f32 a, f32 n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(126));
  const f32 scaled = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  return vaddq_f32(scaled, scaled);
}
// a times the signs at p, +1 or -1: one exclusive or with the top bit.
TERNC_INLINE f32 with_sign(f32 a, const int8_t* p) {
  const int16x4_t signs = vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(p))));
  const uint32x4_t top = vreinterpretq_u32_s32(vshll_n_s16(signs, 16));
  const uint32x4_t flip = vandq_u32(top, vdupq_n_u32(0x80000000));
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), flip));
}
TERNC_INLINE float sum_lanes(f32 a) { return vaddvq_f32(a); }
TERNC_INLINE int32_t max_lanes(i32 a) { return vmaxvq_s32(a); }
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return vsubq_f32(a, b); }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return vdivq_f32(a, b); }
// Lanes i and i + H -> their sum and their difference, for every i without bit H. One rounding:
// the product with +-1 is exact.
template <int H>
TERNC_INLINE f32 butterfly_lanes(f32 a) {
  f32 other = vextq_f32(a, a, 2);
  if constexpr (H == 1) other = vrev64q_f32(a);
  constexpr float A = H == 1 ? -1.0f : 1.0f, B = H == 2 ? -1.0f : 1.0f;
  constexpr float SIGN[LANES] = {1.0f, A, B, A * B};
  return vfmaq_f32(other, a, vld1q_f32(SIGN));
}
