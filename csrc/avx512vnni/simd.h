// The simd vocabulary in AVX-512 VNNI: sixteen lanes of 32 bits. Included inside ternc::avx512vnni.
constexpr int LANES = 16;
constexpr int ACCUMULATORS = 16;          // of 32 registers
constexpr bool FUSES_BUTTERFLIES = true;  // sums and products have units of their own
constexpr int MAX_FIELD = 255;            // vpdpbusd sums four byte products in 32 bits

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
// acc + sum over each lane's four bytes of (signed c + INT8_BIAS) * signed s.
constexpr int INT8_BIAS = 128;
TERNC_INLINE i32 dot_signed(i32 acc, bytes c, bytes s) {
  return dot(acc, _mm512_xor_si512(c, _mm512_set1_epi8(char(0x80))), s);
}
TERNC_INLINE i32 splat_i32(int32_t a) { return _mm512_set1_epi32(a); }
TERNC_INLINE i32 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
TERNC_INLINE i32 load_u8_i32(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TERNC_INLINE void store_i32(int32_t* p, i32 a) { _mm512_storeu_si512(p, a); }
TERNC_INLINE i32 add_i32(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
TERNC_INLINE i32 sub_i32(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
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

// Halves, 16 bits each.
TERNC_INLINE f32 load_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
TERNC_INLINE f32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The bits of a rounded to bf16, half to even; the lower 16 are left over. NaN stays NaN.
TERNC_INLINE __m512i bf16_bits(f32 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc00000));
}
TERNC_INLINE void store_bf16(uint16_t* p, f32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)));
}
TERNC_INLINE f32 round_bf16(f32 a) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(a), _mm512_set1_epi32(int(0xffff0000))));
}
TERNC_INLINE __m256i f16_bits(f32 a) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TERNC_INLINE void store_f16(uint16_t* p, f32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16_bits(a));
}
TERNC_INLINE f32 round_f16(f32 a) { return _mm512_cvtph_ps(f16_bits(a)); }

TERNC_INLINE i32 max_i32(i32 a, i32 b) { return _mm512_max_epi32(a, b); }
TERNC_INLINE i32 magnitude_bits(f32 a) {
  return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
}
// The larger of two magnitudes; NaN beside a number is lost.
TERNC_INLINE f32 larger_magnitude(f32 a, f32 b) { return _mm512_range_ps(a, b, 0x0b); }
constexpr bool TAKES_MAGNITUDES = true;  // larger_magnitude() does, of any values
// Nearest integer, half to even.
TERNC_INLINE i32 round_i32(f32 a) { return _mm512_cvtps_epi32(a); }
// Four vectors of integers that fit int8, one after the other.
TERNC_INLINE void store_i8(int8_t* p, const i32 (&a)[4]) {
  const __m512i low = _mm512_packs_epi32(a[0], a[1]), high = _mm512_packs_epi32(a[2], a[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}
// b where a or b is NaN.
TERNC_INLINE f32 min_f32(f32 a, f32 b) { return _mm512_min_ps(a, b); }
TERNC_INLINE f32 max_f32(f32 a, f32 b) { return _mm512_max_ps(a, b); }
TERNC_INLINE f32 abs_f32(f32 a) { return _mm512_abs_ps(a); }
// |size| with the sign of a.
TERNC_INLINE f32 copy_sign(f32 size, f32 a) {
  const f32 sign = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(sign, size), _mm512_and_ps(sign, a));
}
// 1 / a to 1 ulp or so, for 2^-126 < |a| < 2^126.
TERNC_INLINE f32 reciprocal(f32 a) {
  const f32 guess = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(a, guess, _mm512_set1_ps(1.0f)), guess);
}
// a * 2^n for an integer n.
TERNC_INLINE f32 times_power_of_two(f32 a, f32 n) { return _mm512_scalef_ps(a, n); }
// a times the signs at p, +1 or -1: one exclusive or with the top bit.
TERNC_INLINE f32 with_sign(f32 a, const int8_t* p) {
  const __m512i signs = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(a), signs, _mm512_set1_epi32(int(0x80000000)), 0x78));  // a ^ (b & c)
}
TERNC_INLINE float sum_lanes(f32 a) { return _mm512_reduce_add_ps(a); }
TERNC_INLINE int32_t max_lanes(i32 a) { return _mm512_reduce_max_epi32(a); }
TERNC_INLINE f32 sub_f32(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
TERNC_INLINE f32 div_f32(f32 a, f32 b) { return _mm512_div_ps(a, b); }
// a < b ? x : y, y where a or b is NaN.
TERNC_INLINE f32 select_less(f32 a, f32 b, f32 x, f32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
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
