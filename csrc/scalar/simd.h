// The simd vocabulary in plain C++: one lane, four bytes in a word. Included inside ternc::scalar.
constexpr int LANES = 1;
constexpr int ACCUMULATORS = 4;  // independent sums that stay in registers
constexpr int MAX_FIELD = 255;   // largest unsigned byte that dot() takes without saturating

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
TERNC_INLINE i32 splat_i32(int32_t a) { return uint32_t(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) { return uint32_t(*p); }
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) { return *p; }
TERNC_INLINE void store_i32(int32_t* p, i32 a) { *p = int32_t(a); }
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return a + b; }
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

TERNC_INLINE f32 load_i8_f32(const int8_t* p) { return float(*p); }
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return a - b; }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return a / b; }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) { return a < b ? x : y; }
// 2^n for an integer n from -126 to 127; no cast from float, which a NaN would make undefined.
TERNC_INLINE f32 power_of_two(f32 n) {
  n += 0x1.8p23f + 127.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &n, 4);
  bits <<= 23;
  __builtin_memcpy(&n, &bits, 4);
  return n;
}
// One lane has no neighbour: declared for the sake of two-phase lookup, never called.
template <int H>
f32 butterfly_lanes(f32 a);
