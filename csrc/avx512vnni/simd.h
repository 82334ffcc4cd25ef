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
