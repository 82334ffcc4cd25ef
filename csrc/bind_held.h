// Products of an op, with the tensors that they read and write: bind_linear.cpp has the
// definitions.
#pragma once

#include "bind_product.h"

namespace ternc {

// One weight of a call: what the kernels read, where its result goes, and what keeps that alive.
struct HeldProduct {
  WeightTensors held;
  Tensor y, bias, residual;
  Output out;
};

// Packed weights as an op with several receives them: a list of each part.
struct PackedLists {
  const Few<Tensor>&weights, &scales, &multipliers, &biases;
  const Few<int64_t>&out_features, &group_sizes, &layouts;
};

void check_input(const char* op, const Shape& x, int64_t activation_bits);

// The weights of an op that takes `count` of them, each with a new y like x in `type`.
Few<HeldProduct> read_products(const char* op, const Shape& x, size_t count,
                               const PackedLists& lists, ScalarType type);

void multiply(const Input& x, int64_t activation_bits, const HeldProduct* held, size_t count);

template <size_t>
using OneTensor = Tensor;

}  // namespace ternc
