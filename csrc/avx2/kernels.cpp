// Kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
  #include <immintrin.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../target.h"
  #include "../ternc.h"

TERNC_TARGET_BEGIN("avx2,fma,f16c")

namespace ternc::avx2 {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "dot.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = ALL_KERNELS;
}  // namespace ternc::avx2

TERNC_TARGET_END
#endif
