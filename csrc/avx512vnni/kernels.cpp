// The kernels of avx512vnni.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "../target.h"
#include "../ternc.h"

TERNC_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace ternc::avx512vnni {
namespace {
#include "simd.h"

#include "../generic/decode.h"
#include "../generic/values.h"
#include "../generic/quantize.h"
#include "../generic/linear.h"
#include "../generic/linear_i8.h"
#include "../generic/linear_f32.h"
#include "../generic/dequantize.h"
#include "../generic/fit.h"
}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    quantize,
    widen,
    {linear_i8<1>, linear_i8<2>, linear_i8<3>},
    {linear_f32<1>, linear_f32<2>, linear_f32<3>},
    dequantize,
    largest,
    magnitudes,
    fit_rows,
    snap_rows,
    snap_sums,
};
}  // namespace ternc::avx512vnni

TERNC_TARGET_END
#endif
