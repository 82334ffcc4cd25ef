// dot() in AVX2: pairs of bytes in 16 bits, pairs of pairs in 32.
constexpr int MAX_FIELD = 128;  // vpmaddubsw: 2 * 128 * 127 = 32512 is the last pair to fit int16

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) {
  const __m256i pairs = _mm256_maddubs_epi16(u, s);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// acc + sum over each lane's four bytes of signed c * signed s, neither of them -128: |c| times s
// with the sign of c.
constexpr int INT8_BIAS = 0;  // what dot_signed() adds to every c
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) {
  return dot(acc, _mm256_abs_epi8(c), _mm256_sign_epi8(s, c));
}
