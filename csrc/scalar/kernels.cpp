// Kernels in plain C++: any machine.
#include <algorithm>
#include <cmath>
#include <functional>

#include "../target.h"
#include "../ternc.h"

namespace ternc::scalar {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "simd.h"
#include "../generic/kernels.h"
// clang-format on
}  // namespace

extern const Kernels kernels;
const Kernels kernels = ALL_KERNELS;
}  // namespace ternc::scalar
