// What is multiplied, and the one function that does it.
#pragma once

#include "bind.h"

namespace ternc {

// What the products multiply: floating-point x, or integers q with their scales.
struct Input {
  const void* values;  // [tokens, columns]
  Dtype dtype;
  const float* scale;  // null: values are floating point
  int64_t tokens, columns;
};

// One weight of a call, and where its product goes.
struct Product {
  const WeightTensors* held;
  Output out;
};

// activation_bits: 8, 4 or 0, floating point.
void multiply(const Input& x, int64_t activation_bits, const Few<Product>& products);

}  // namespace ternc
