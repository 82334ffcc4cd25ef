// The tests, each of one group of kernels of one instruction set.
#pragma once

#include "../../csrc/ternc.h"

namespace ternc::tests {

void test_quantize(const Kernels& kernels);
void test_linear_i8(const Kernels& kernels);
void test_linear_f32(const Kernels& kernels);
void test_dequantize(const Kernels& kernels);
void test_hadamard(const Kernels& kernels);
void test_norm(const Kernels& kernels);
void test_activate(const Kernels& kernels);
void test_attention(const Kernels& kernels);
void test_fit(const Kernels& kernels);

void test_dispatch();  // of the table of instruction sets itself

}  // namespace ternc::tests
