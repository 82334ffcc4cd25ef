// The simd vocabulary in AVX2, but for dot(): eight lanes of 32 bits. Included inside ternc::avx2
// and ternc::avxvnni, before their dot.h.
constexpr int LANES = 8;
constexpr int ACCUMULATORS = 8;           // of 16 registers: operands and masks need the rest
constexpr bool FUSES_BUTTERFLIES = true;  // sums and products have units of their own

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
TERNC_INLINE i32 sub_i32(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
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

// Halves, 16 bits each.
TERNC_INLINE f32 load_bf16(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
TERNC_INLINE f32 load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The bits of a rounded to bf16, half to even; the lower 16 are left over. NaN stays NaN.
TERNC_INLINE __m256i bf16_bits(f32 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                            _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
TERNC_INLINE void store_bf16(uint16_t* p, f32 a) {
  const __m256i halves = _mm256_srli_epi32(bf16_bits(a), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
TERNC_INLINE f32 round_bf16(f32 a) {
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(a), _mm256_set1_epi32(int(0xffff0000))));
}
TERNC_INLINE __m128i f16_bits(f32 a) {
  return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TERNC_INLINE void store_f16(uint16_t* p, f32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16_bits(a));
}
TERNC_INLINE f32 round_f16(f32 a) { return _mm256_cvtph_ps(f16_bits(a)); }

TERNC_INLINE i32 max_i32(i32 a, i32 b) { return _mm256_max_epi32(a, b); }
TERNC_INLINE i32 magnitude_bits(f32 a) {
  return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
}
TERNC_INLINE f32 larger_magnitude(f32 a, f32 b) {  // of magnitudes
  return _mm256_castsi256_ps(max_i32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
constexpr bool TAKES_MAGNITUDES = false;
// Nearest integer, half to even.
TERNC_INLINE i32 round_i32(f32 a) { return _mm256_cvtps_epi32(a); }
// Four vectors of integers that fit int8, one after the other.
TERNC_INLINE void store_i8(int8_t* p, const i32 (&a)[4]) {
  const __m256i low = _mm256_packs_epi32(a[0], a[1]), high = _mm256_packs_epi32(a[2], a[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
// b where a or b is NaN.
TERNC_INLINE f32 min_f32(f32 a, f32 b) { return _mm256_min_ps(a, b); }
TERNC_INLINE f32 max_f32(f32 a, f32 b) { return _mm256_max_ps(a, b); }
TERNC_INLINE f32 abs_f32(f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// |size| with the sign of a.
TERNC_INLINE f32 copy_sign(f32 size, f32 a) {
  const f32 sign = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, size), _mm256_and_ps(sign, a));
}
// 1 / a to 1 ulp or so, for 2^-126 < |a| < 2^126.
TERNC_INLINE f32 reciprocal(f32 a) {
  const f32 guess = _mm256_rcp_ps(a);
  return _mm256_fmadd_ps(guess, _mm256_fnmadd_ps(a, guess, _mm256_set1_ps(1.0f)), guess);
}
// a * 2^n for an integer n from -126 to 128, in two factors: 2^128 is too much for one.
TERNC_INLINE f32 times_power_of_two(f32 a, f32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126));
  const f32 scaled = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return _mm256_add_ps(scaled, scaled);
}
// a times the signs at p, +1 or -1: one exclusive or with the top bit.
TERNC_INLINE f32 with_sign(f32 a, const int8_t* p) {
  const __m256i signs = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_xor_ps(a, _mm256_and_ps(_mm256_castsi256_ps(signs), _mm256_set1_ps(-0.0f)));
}
TERNC_INLINE float sum_lanes(f32 a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
TERNC_INLINE int32_t max_lanes(i32 a) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return _mm256_div_ps(a, b); }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
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
