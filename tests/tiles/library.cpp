// The AMX kernels on emulated tiles as a C function, for ctypes.
#include "../../csrc/ternc.h"

namespace ternc {
namespace avx512vnni {
extern const Kernels kernels;
const Kernels kernels = {};  // fewer than MIN_TILE_TOKENS tokens are not asked for
}  // namespace avx512vnni
namespace amx {
extern const Kernels kernels;
}
}  // namespace ternc

// Tokens [begin, end) of y [M, N] = q [M, stride], sx x packed weight; 0 if the tiles were
// released. sums: of q, a token.
extern "C" int linear(int planes, int8_t* q, float* sx, int32_t* sums, int8_t* tiles,
                      int64_t tokens, int64_t stride, const uint8_t* bytes, const float* scale,
                      const uint8_t* multiplier, int64_t rows, int64_t columns, int64_t group_size,
                      int64_t groups, const float* bias, float* y, int64_t begin, int64_t end) {
  using namespace ternc;
  const Tokens input = {q, sx, sums, tokens, stride, tiles};
  for (int64_t t = 0; t < ceil_div(tokens, TILE_TOKENS) * TILE_TOKENS; ++t)
    amx::kernels.tile_token(t < tokens ? q + t * stride : nullptr, stride, t, tiles);
  const Weight weight = {bytes, scale,   multiplier, ScaleKind::row,
                         rows,  columns, group_size, groups};
  const Output out = {y, Dtype::f32, bias, Dtype::f32, nullptr};
  const int64_t blocks = ceil_div(rows, block_rows(planes));
  amx::kernels.linear_i8[kind_index(planes)]({weight, input, out}, {0, blocks, begin, end});
  return emulated::config.palette;
}
