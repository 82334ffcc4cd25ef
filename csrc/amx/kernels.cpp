// Kernels for AMX: int8 tile products for five tokens and more; everything else is AVX-512 VNNI's.
#include "../target.h"

#if defined(TERNC_HAS_AMX)
  #include <immintrin.h>

  #include "../ternc.h"

TERNC_TARGET_BEGIN(
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8,"
    "prfchw")

namespace ternc::avx512vnni {
extern const Kernels kernels;
}

namespace ternc::amx {
namespace {
// clang-format off: the kernels are written in the vocabulary of simd.h
#include "../avx512vnni/simd.h"
#include "../generic/linear.h"
#include "tiles.h"
#include "decode.h"
#include "outputs.h"
#include "linear_i8.h"
// clang-format on
}  // namespace
}  // namespace ternc::amx

TERNC_TARGET_END

namespace ternc::amx {

// Runs when the library loads, on any x86-64 machine: outside of the target region.
static Kernels with_tiles(Kernels kernels) {
  kernels.tile_token = tile_token;
  kernels.linear_i8[0] = linear_i8<1>;
  kernels.linear_i8[1] = linear_i8<2>;
  kernels.linear_i8[2] = linear_i8<3>;
  kernels.linear_i8[kind_index(INT8)] = linear_i8<INT8>;
  return kernels;
}

extern const Kernels kernels;
const Kernels kernels = with_tiles(avx512vnni::kernels);
}  // namespace ternc::amx
#endif
