// Kernels for AVX-512 with VNNI (vpdpbusd).
#if defined(__x86_64__)
  #include <immintrin.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../target.h"
  #include "../ternc.h"
  #include "dense.h"

TERNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace ternc::avx512vnni {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

static bool has_vbmi() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}
static void linear_i8_dense(const LinearI8Args& args, const Range& range) {
  (has_vbmi() ? dense_i8 : linear_i8<EXPANDED>)(args, range);
}
static void linear_f32_dense(const LinearF32Args& args, const Range& range) {
  (has_vbmi() ? dense_f32 : linear_f32<EXPANDED>)(args, range);
}

static constexpr Kernels with_dense(Kernels kernels) {
  kernels.linear_i8[kind_index(DENSE)] = linear_i8_dense;
  kernels.linear_f32[kind_index(DENSE)] = linear_f32_dense;
  return kernels;
}

extern const Kernels kernels;
const Kernels kernels = with_digits(with_dense(ALL_KERNELS));
}  // namespace ternc::avx512vnni

TERNC_TARGET_END
#endif
