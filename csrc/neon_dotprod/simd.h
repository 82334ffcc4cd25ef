// The simd vocabulary in NEON with the dot product extension. Included inside ternc::neon_dotprod.
#include "../neon/vectors.h"

constexpr int MAX_FIELD = 127;  // sdot takes both its factors as signed

// acc + sum over each lane's four bytes of unsigned u * signed s. Not by vdotq_s32: clang before 16
// has it only where the whole file is compiled for the extension.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) {
  __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(s));
  return acc;
}

// acc + sum over each lane's four bytes of signed c * signed s: what dot() computes.
constexpr int INT8_BIAS = 0;  // what dot_signed() adds to every c
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) { return dot(acc, c, s); }
