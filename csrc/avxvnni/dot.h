// dot() in AVX-VNNI: one instruction.
constexpr int MAX_FIELD = 255;  // vpdpbusd sums four byte products in 32 bits

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
// acc + sum over each lane's four bytes of (signed c + INT8_BIAS) * signed s.
constexpr int INT8_BIAS = 128;
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) {
  return dot(acc, _mm256_xor_si256(c, _mm256_set1_epi8(char(0x80))), s);
}
