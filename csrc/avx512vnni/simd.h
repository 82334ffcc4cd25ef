// The simd vocabulary in AVX-512 VNNI: sixteen lanes of 32 bits. Included inside ternc::avx512vnni.
constexpr int LANES = 16;
constexpr int ACCUMULATORS = 16;  // of 32 registers
constexpr int MAX_FIELD = 255;    // vpdpbusd sums four byte products in 32 bits

using bytes = __m512i;
using i32 = __m512i;
using f32 = __m512;

TERNC_INLINE bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
TERNC_INLINE bytes splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
TERNC_INLINE bytes splat_byte(uint8_t b) { return _mm512_set1_epi8(char(b)); }
TERNC_INLINE bytes and_bytes(bytes a, bytes b) { return _mm512_and_si512(a, b); }
TERNC_INLINE bytes or_bytes(bytes a, bytes b) { return _mm512_or_si512(a, b); }
TERNC_INLINE bytes sub_bytes(bytes a, bytes b) { return _mm512_sub_epi8(a, b); }
// Bits cross byte borders: mask afterwards.
template <int S>
TERNC_INLINE bytes shift_bytes_right(bytes a) {
  return _mm512_srli_epi16(a, S);
}
template <int S>
TERNC_INLINE bytes shift_bytes_left(bytes a) {
  return _mm512_slli_epi16(a, S);
}

// acc + sum over each lane's four bytes of unsigned u * signed s.
TERNC_INLINE i32 dot(i32 acc, bytes u, bytes s) { return _mm512_dpbusd_epi32(acc, u, s); }
TERNC_INLINE i32 splat_i32(int32_t a) { return _mm512_set1_epi32(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TERNC_INLINE void store_i32(int32_t* p, i32 a) { _mm512_storeu_si512(p, a); }
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
TERNC_INLINE i32 mul_i32(i32 a, i32 b) { return _mm512_mullo_epi32(a, b); }
template <int S>
TERNC_INLINE i32 shift_i32_left(i32 a) {
  return _mm512_slli_epi32(a, S);
}
template <int S>
TERNC_INLINE i32 shift_i32_right(i32 a) {  // arithmetic
  return _mm512_srai_epi32(a, S);
}

TERNC_INLINE f32 splat_f32(float a) { return _mm512_set1_ps(a); }
TERNC_INLINE f32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
TERNC_INLINE void store_f32(float* p, f32 a) { _mm512_storeu_ps(p, a); }
TERNC_INLINE f32 add_f32(f32 a, f32 b) { return _mm512_add_ps(a, b); }
TERNC_INLINE f32 mul_f32(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
TERNC_INLINE f32 fma_f32(f32 a, f32 b, f32 acc) { return _mm512_fmadd_ps(a, b, acc); }
TERNC_INLINE f32 to_f32(i32 a) { return _mm512_cvtepi32_ps(a); }
// Signed byte J of every lane.
template <int J>
TERNC_INLINE f32 byte_f32(bytes a) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * J), 24));
}

TERNC_INLINE f32 load_i8_f32(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return _mm512_div_ps(a, b); }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// 2^n for an integer n from -126 to 127.
TERNC_INLINE f32 power_of_two(f32 n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// Lanes i and i + H -> their sum and their difference, for every i without bit H. One rounding:
// the product with +-1 is exact.
template <int H>
TERNC_INLINE f32 butterfly_lanes(f32 a) {
  f32 other = _mm512_shuffle_f32x4(a, a, 0x4e);
  if constexpr (H == 1) other = _mm512_permute_ps(a, 0xb1);
  if constexpr (H == 2) other = _mm512_permute_ps(a, 0x4e);
  if constexpr (H == 4) other = _mm512_shuffle_f32x4(a, a, 0xb1);
  constexpr float A = H == 1 ? -1.0f : 1.0f, B = H == 2 ? -1.0f : 1.0f;
  constexpr float C = H == 4 ? -1.0f : 1.0f, D = H == 8 ? -1.0f : 1.0f;
  const f32 sign = _mm512_setr_ps(1, A, B, A * B, C, A * C, B * C, A * B * C, D, A * D, B * D,
                                  A * B * D, C * D, A * C * D, B * C * D, A * B * C * D);
  return _mm512_fmadd_ps(a, sign, other);
}
