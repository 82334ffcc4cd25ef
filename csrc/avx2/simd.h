// The simd vocabulary in AVX2: eight lanes of 32 bits. Included inside ternc::avx2.
constexpr int LANES = 8;
constexpr int ACCUMULATORS = 8;  // of 16 registers: operands and masks need the rest
constexpr int MAX_FIELD = 128;   // vpmaddubsw: 2 * 128 * 127 = 32512 is the last pair to fit int16

using bytes = __m256i;
using i32 = __m256i;
using f32 = __m256;

TERNC_INLINE bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
TERNC_INLINE bytes splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
TERNC_INLINE bytes splat_byte(uint8_t b) { return _mm256_set1_epi8(char(b)); }
TERNC_INLINE bytes and_bytes(bytes a, bytes b) { return _mm256_and_si256(a, b); }
TERNC_INLINE bytes or_bytes(bytes a, bytes b) { return _mm256_or_si256(a, b); }
TERNC_INLINE bytes sub_bytes(bytes a, bytes b) { return _mm256_sub_epi8(a, b); }
// Bits cross byte borders: mask afterwards.
template <int S>
TERNC_INLINE bytes shift_bytes_right(bytes a) {
  return _mm256_srli_epi16(a, S);
}
template <int S>
TERNC_INLINE bytes shift_bytes_left(bytes a) {
  return _mm256_slli_epi16(a, S);
}

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) {
  const __m256i pairs = _mm256_maddubs_epi16(u, s);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
TERNC_INLINE i32 splat_i32(int32_t a) { return _mm256_set1_epi32(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
TERNC_INLINE void store_i32(int32_t* p, i32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return _mm256_add_epi32(a, b); }
TERNC_INLINE i32 mul_i32(i32 a, i32 b) { return _mm256_mullo_epi32(a, b); }
template <int S>
TERNC_INLINE i32 shift_i32_left(i32 a) {
  return _mm256_slli_epi32(a, S);
}
template <int S>
TERNC_INLINE i32 shift_i32_right(i32 a) {  // arithmetic
  return _mm256_srai_epi32(a, S);
}

TERNC_INLINE f32 splat_f32(float a) { return _mm256_set1_ps(a); }
TERNC_INLINE f32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
TERNC_INLINE void store_f32(float* p, f32 a) { _mm256_storeu_ps(p, a); }
TERNC_INLINE f32 add_f32(f32 a, f32 b) { return _mm256_add_ps(a, b); }
TERNC_INLINE f32 mul_f32(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
TERNC_INLINE f32 fma_f32(f32 a, f32 b, f32 acc) { return _mm256_fmadd_ps(a, b, acc); }
TERNC_INLINE f32 to_f32(i32 a) { return _mm256_cvtepi32_ps(a); }
// Signed byte J of every lane.
template <int J>
TERNC_INLINE f32 byte_f32(bytes a) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * J), 24));
}

TERNC_INLINE f32 load_i8_f32(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return _mm256_div_ps(a, b); }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
// 2^n for an integer n from -126 to 127.
TERNC_INLINE f32 power_of_two(f32 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// Lanes i and i + H -> their sum and their difference, for every i without bit H. One rounding:
// the product with +-1 is exact.
template <int H>
TERNC_INLINE f32 butterfly_lanes(f32 a) {
  f32 other = _mm256_permute2f128_ps(a, a, 0x01);
  if constexpr (H == 1) other = _mm256_permute_ps(a, 0xb1);
  if constexpr (H == 2) other = _mm256_permute_ps(a, 0x4e);
  constexpr float A = H == 1 ? -1.0f : 1.0f, B = H == 2 ? -1.0f : 1.0f, C = H == 4 ? -1.0f : 1.0f;
  const f32 sign = _mm256_setr_ps(1, A, B, A * B, C, A * C, B * C, A * B * C);
  return _mm256_fmadd_ps(a, sign, other);
}
