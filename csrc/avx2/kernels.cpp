// The kernels of avx2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../target.h"
#include "../ternc.h"

TERNC_TARGET_BEGIN("avx2,fma")

namespace ternc::avx2 {
namespace {
#include "simd.h"

#include "../generic/decode.h"
#include "../generic/values.h"
#include "../generic/quantize.h"
#include "../generic/linear.h"
#include "../generic/linear_i8.h"
#include "../generic/linear_f32.h"
}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    quantize,
    widen,
    {linear_i8<1>, linear_i8<2>, linear_i8<3>},
    {linear_f32<1>, linear_f32<2>, linear_f32<3>},
    nullptr, nullptr, nullptr, nullptr, nullptr,
};
}  // namespace ternc::avx2

TERNC_TARGET_END
#endif
