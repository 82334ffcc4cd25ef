// Kernels for AVX-512 with VNNI (vpdpbusd).
#if defined(__x86_64__)
  #include <immintrin.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../target.h"
  #include "../ternc.h"

TERNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace ternc::avx512vnni {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = ALL_KERNELS;
}  // namespace ternc::avx512vnni

TERNC_TARGET_END
#endif
