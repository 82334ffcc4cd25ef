// The simd vocabulary in plain C++: one lane, four bytes in a word. Included inside ternc::scalar.
#include "../generic/halves.h"

constexpr int LANES = 1;
constexpr int ACCUMULATORS = 4;  // independent sums that stay in registers
constexpr bool FUSES_BUTTERFLIES = false;
constexpr int MAX_FIELD = 255;  // largest unsigned byte that dot() takes without saturating

using bytes = uint32_t;  // byte 0 lowest
using i32 = uint32_t;    // two's complement, wraps
using f32 = float;

TERNC_INLINE bytes load_bytes(const void* p) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  return uint32_t(b[0]) | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
}
TERNC_INLINE bytes splat_word(const void* p) { return load_bytes(p); }
TERNC_INLINE bytes splat_byte(uint8_t b) { return 0x01010101u * b; }
TERNC_INLINE bytes and_bytes(bytes a, bytes b) { return a & b; }
TERNC_INLINE bytes or_bytes(bytes a, bytes b) { return a | b; }
// Bytewise a - b: the high bits are kept apart so that no borrow crosses into the next byte.
TERNC_INLINE bytes sub_bytes(bytes a, bytes b) {
  return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}
// Bits cross byte borders: mask afterwards.
template <int S>
TERNC_INLINE bytes shift_bytes_right(bytes a) {
  return a >> S;
}
template <int S>
TERNC_INLINE bytes shift_bytes_left(bytes a) {
  return a << S;
}

TERNC_INLINE int32_t signed_at(bytes a, int byte) { return int8_t(a >> (8 * byte)); }

// acc + sum over the lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) {
  return acc + uint32_t(int32_t(u & 255) * signed_at(s, 0)) +
         uint32_t(int32_t(u >> 8 & 255) * signed_at(s, 1)) +
         uint32_t(int32_t(u >> 16 & 255) * signed_at(s, 2)) +
         uint32_t(int32_t(u >> 24) * signed_at(s, 3));
}
// acc + sum over the lane's four bytes of signed c * signed s.
constexpr int INT8_BIAS = 0;  // what dot_signed() adds to every c
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) {
  for (int j = 0; j < 4; ++j) acc += uint32_t(signed_at(c, j) * signed_at(s, j));
  return acc;
}
TERNC_INLINE i32 splat_i32(int32_t a) { return uint32_t(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) { return uint32_t(*p); }
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) { return *p; }
TERNC_INLINE void store_i32(int32_t* p, i32 a) { *p = int32_t(a); }
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return a + b; }
TERNC_INLINE i32 sub_i32(i32 a, i32 b) { return a - b; }
TERNC_INLINE i32 mul_i32(i32 a, i32 b) { return a * b; }
template <int S>
TERNC_INLINE i32 shift_i32_left(i32 a) {
  return a << S;
}
template <int S>
TERNC_INLINE i32 shift_i32_right(i32 a) {  // arithmetic
  return uint32_t(int32_t(a) >> S);
}

TERNC_INLINE f32 splat_f32(float a) { return a; }
TERNC_INLINE f32 load_f32(const float* p) { return *p; }
TERNC_INLINE void store_f32(float* p, f32 a) { *p = a; }
TERNC_INLINE f32 add_f32(f32 a, f32 b) { return a + b; }
TERNC_INLINE f32 mul_f32(f32 a, f32 b) { return a * b; }
TERNC_INLINE f32 fma_f32(f32 a, f32 b, f32 acc) { return a * b + acc; }
TERNC_INLINE f32 to_f32(i32 a) { return float(int32_t(a)); }
// Signed byte J of every lane.
template <int J>
TERNC_INLINE f32 byte_f32(bytes a) {
  return float(signed_at(a, J));
}

// Halves, 16 bits each.
TERNC_INLINE f32 load_bf16(const uint16_t* p) { return float_of(uint32_t(*p) << 16); }
TERNC_INLINE f32 load_f16(const uint16_t* p) { return half_to_float(*p); }
TERNC_INLINE void store_bf16(uint16_t* p, f32 a) { *p = float_to_bfloat(a); }
TERNC_INLINE void store_f16(uint16_t* p, f32 a) { *p = float_to_half(a); }
TERNC_INLINE f32 round_bf16(f32 a) { return float_of(uint32_t(float_to_bfloat(a)) << 16); }
TERNC_INLINE f32 round_f16(f32 a) { return half_to_float(float_to_half(a)); }

TERNC_INLINE i32 max_i32(i32 a, i32 b) { return int32_t(a) > int32_t(b) ? a : b; }
TERNC_INLINE i32 magnitude_bits(f32 a) { return bits_of(a) & 0x7fffffffu; }
TERNC_INLINE f32 larger_magnitude(f32 a, f32 b) {  // of magnitudes
  return bits_of(a) > bits_of(b) ? a : b;
}
constexpr bool TAKES_MAGNITUDES = false;
// Nearest integer, half to even, for |a| < 2^22: the adder rounds.
TERNC_INLINE i32 round_i32(f32 a) { return bits_of(a + 0x1.8p23f) - bits_of(0x1.8p23f); }
// Four integers that fit int8, one after the other.
TERNC_INLINE void store_i8(int8_t* p, const i32 (&a)[4]) {
  for (int i = 0; i < 4; ++i) p[i] = int8_t(a[i]);
}
// b where a or b is NaN.
TERNC_INLINE f32 min_f32(f32 a, f32 b) { return a < b ? a : b; }
TERNC_INLINE f32 max_f32(f32 a, f32 b) { return a > b ? a : b; }
TERNC_INLINE f32 abs_f32(f32 a) { return float_of(bits_of(a) & 0x7fffffffu); }
// |size| with the sign of a.
TERNC_INLINE f32 copy_sign(f32 size, f32 a) {
  return float_of((bits_of(size) & 0x7fffffffu) | (bits_of(a) & 0x80000000u));
}
TERNC_INLINE f32 reciprocal(f32 a) { return 1.0f / a; }
// a * 2^n for an integer n from -126 to 128, in two factors: 2^128 is too much for one.
TERNC_INLINE f32 times_power_of_two(f32 a, f32 n) {
  const f32 scaled = a * float_of((round_i32(n) + 126) << 23);
  return scaled + scaled;
}
// a times the sign at p, +1 or -1.
TERNC_INLINE f32 with_sign(f32 a, const int8_t* p) { return *p < 0 ? -a : a; }
TERNC_INLINE float sum_lanes(f32 a) { return a; }
TERNC_INLINE int32_t max_lanes(i32 a) { return int32_t(a); }
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return a - b; }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return a / b; }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) { return a < b ? x : y; }
// One lane has no neighbour: declared for the sake of two-phase lookup, never called.
template <int H>
f32 butterfly_lanes(f32 a);
