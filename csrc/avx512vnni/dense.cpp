// Kernels for DENSE weights in AVX-512 with VNNI and VBMI.
#if defined(__x86_64__)
  #include "dense.h"

  #include <immintrin.h>

  #include "../target.h"

TERNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace ternc::avx512vnni {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/linear_f32.h"
#include "../generic/linear_i8.h"
// clang-format on

constexpr int ESCAPE = 192;

// A byte's low six bits -> its four fields: of plain bytes, and of those from ESCAPE on.
struct PermuteTables {
  alignas(64) uint8_t four[64], escaped_four[64], escaped_fifth[64];
};

constexpr PermuteTables permute_tables() {
  PermuteTables tables = {};
  for (int i = 0; i < 64; ++i) {
    tables.four[i] = DENSE_TABLE.four[i];
    tables.escaped_four[i] = DENSE_TABLE.four[ESCAPE + i];
    tables.escaped_fifth[i] = DENSE_TABLE.fifth[ESCAPE + i];
  }
  return tables;
}
constexpr PermuteTables TABLES = permute_tables();

TERNC_INLINE __mmask64 escaped(bytes packed) {
  return _mm512_cmpge_epu8_mask(packed, splat_byte(ESCAPE));
}
TERNC_INLINE bytes dense_four(bytes packed) {
  const bytes plain = _mm512_permutexvar_epi8(packed, load_bytes(TABLES.four));
  return _mm512_mask_permutexvar_epi8(plain, escaped(packed), packed,
                                      load_bytes(TABLES.escaped_four));
}
TERNC_INLINE bytes dense_fifth(bytes packed) {
  return _mm512_mask_permutexvar_epi8(packed, escaped(packed), packed,
                                      load_bytes(TABLES.escaped_fifth));
}
}  // namespace

void dense_i8(const LinearI8Args& args, const Range& range) { linear_i8<DENSE>(args, range); }
void dense_f32(const LinearF32Args& args, const Range& range) { linear_f32<DENSE>(args, range); }
}  // namespace ternc::avx512vnni

TERNC_TARGET_END
#endif
