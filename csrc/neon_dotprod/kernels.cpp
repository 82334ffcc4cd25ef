// Kernels for NEON with the dot product extension (sdot), Armv8.2.
#if defined(__aarch64__)
  #include <arm_neon.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../target.h"
  #include "../ternc.h"

  #if defined(__clang__)
TERNC_TARGET_BEGIN("dotprod")
  #else
TERNC_TARGET_BEGIN("arch=armv8.2-a+dotprod")
  #endif

namespace ternc::neon_dotprod {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = with_digits(ALL_KERNELS);
}  // namespace ternc::neon_dotprod

TERNC_TARGET_END
#endif
