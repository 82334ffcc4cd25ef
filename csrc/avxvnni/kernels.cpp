// Kernels for AVX-VNNI: AVX2 with vpdpbusd, without AVX-512.
#include "../target.h"

#if defined(TERNC_HAS_AVX_VNNI)
  #include <immintrin.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../ternc.h"

TERNC_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

namespace ternc::avxvnni {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "../avx2/simd.h"
#include "dot.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = with_digits(ALL_KERNELS);
}  // namespace ternc::avxvnni

TERNC_TARGET_END
#endif
