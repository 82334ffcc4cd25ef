// Kernels for NEON, which every aarch64 machine has.
#if defined(__aarch64__)
  #include <arm_neon.h>

  #include <algorithm>
  #include <cmath>
  #include <functional>

  #include "../target.h"
  #include "../ternc.h"

namespace ternc::neon {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = ALL_KERNELS;
}  // namespace ternc::neon
#endif
