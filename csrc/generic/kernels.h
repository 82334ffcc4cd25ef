// Every kernel of one instruction set. <isa>/kernels.cpp includes this inside its namespace, after
// its simd.h; the headers of this folder contain no intrinsics.
#pragma once

#include "activation.h"
#include "attention.h"
#include "attention_rows.h"
#include "dequantize.h"
#include "digits.h"
#include "fit.h"
#include "hadamard.h"
#include "linear_f32.h"
#include "linear_i8.h"
#include "norm.h"
#include "quantize.h"

constexpr Kernels ALL_KERNELS = {
    quantize,
    widen,
    sum_groups,
    nullptr,
    norm,
    activate,
    hadamard,
    attention,
    ROWS,
    attention_rows,
    {linear_i8<1>, linear_i8<2>, linear_i8<3>, linear_i8<EXPANDED>, linear_i8<INT8>},
    {linear_f32<1>, linear_f32<2>, linear_f32<3>, linear_f32<EXPANDED>, linear_f32<INT8>},
    nullptr,
    nullptr,
    nullptr,
    dequantize,
    largest,
    magnitudes,
    fit_rows,
    snap_rows,
    snap_sums,
};

// For instruction sets whose dot() is one instruction, of any signed bytes.
constexpr Kernels with_digits(Kernels kernels) {
  kernels.digits = digits;
  kernels.split = split;
  kernels.join = join;
  return kernels;
}
