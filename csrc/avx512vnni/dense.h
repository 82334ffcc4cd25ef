// DENSE decoded in registers with the byte permutation of AVX-512 VBMI: kernels that machines with
// VBMI run in place of those for EXPANDED.
#pragma once

#include "../ternc.h"

namespace ternc::avx512vnni {
void dense_i8(const LinearI8Args&, const Range&);
void dense_f32(const LinearF32Args&, const Range&);
}  // namespace ternc::avx512vnni
