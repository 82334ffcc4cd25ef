// The simd vocabulary in plain NEON. Included inside ternc::neon.
#include "vectors.h"

constexpr int MAX_FIELD = 127;  // bytes are multiplied as signed; a pair then fits int16

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) {
  const int8x16_t a = vreinterpretq_s8_u8(u), b = vreinterpretq_s8_u8(s);
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  return vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(a, b)));
}

// acc + sum over each lane's four bytes of signed c * signed s: what dot() computes.
constexpr int INT8_BIAS = 0;  // what dot_signed() adds to every c
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) { return dot(acc, c, s); }
