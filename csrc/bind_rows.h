// Rows of a tensor, vectors of columns and words: what the one-pass kernels take, read from
// arguments of an op.
#pragma once

#include <cstring>

#include "bind.h"

namespace ternc {

template <size_t N>
int index_of(const char* op, const char* argument, const char* word,
             const char* const (&names)[N]) {
  size_t i = 0;
  while (i < N && std::strcmp(word, names[i]) != 0) ++i;
  TERNC_CHECK(i < N, "ternc::", op, ": ", argument, "='", word, "' is unknown");
  return int(i);
}

// Tokens of x where they lie, if one stride leads from each to the next; else of a copy.
struct RowsOf {
  Tensor held;
  Shape shape;
  Rows rows;

  RowsOf(const char* op, const char* name, const Tensor& x)
      : held(x.borrow()), shape(x.shape()), rows{} {
    TERNC_CHECK(shape.dims >= 1, "ternc::", op, ": ", name,
                " is a scalar; it needs a dimension of features");
    rows.dtype = dtype_of(x.scalar_type(), op, name);
    rows.stride = stride_of(x, shape);
    if (rows.stride < 0) held = dense(x), rows.stride = shape.columns();
    rows.values = held.const_data_ptr();
  }

  // Elements from a token to the next; -1: there is no such number.
  static int64_t stride_of(const Tensor& x, const Shape& shape) {
    if (x.is_contiguous()) return shape.columns();
    const int64_t *sizes = shape.sizes, *strides = x.strides(), last = shape.dims - 1;
    if (sizes[last] > 1 && strides[last] != 1) return -1;
    int64_t stride = -1, inner = 1;  // of all dimensions inside of d together: tokens
    for (int64_t d = last - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (stride < 0) stride = strides[d];
      if (strides[d] != stride * inner) return -1;
      inner *= sizes[d];
    }
    return stride < 0 ? sizes[last] : stride;
  }
};

// A vector [K] of factors or summands; kept alive.
struct ColumnsOf {
  Tensor given, held;
  ColumnVector vector{nullptr, Dtype::f32, 0.0f};

  ColumnsOf(const char* op, const char* name, const std::optional<Tensor>& t, int64_t columns,
            float offset) {
    if (!t.has_value()) return;
    const Shape shape = t->shape();
    TERNC_CHECK(shape.dims == 1 && shape.sizes[0] == columns, "ternc::", op, ": ", name, " has ",
                shape.numel(), " elements, wanted [", columns, "]");
    ScalarType type = t->scalar_type();
    const bool wide = type == ScalarType::Double;
    if (wide) given = converted(*t, type = ScalarType::Float);
    held = dense(wide ? given : *t);
    vector = {held.const_data_ptr(), dtype_of(type, op, name), offset};
  }
};

// kernel(args, token_begin, token_end, scratch) over the threads.
template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args,
                 int64_t tokens) {
  parallel_for(tokens, token_grain(args.columns), [&](int64_t begin, int64_t end) {
    const Scratch<float, 32768> rows(scratch_floats(args.columns));
    kernel(args, begin, end, rows.get());
  });
}

inline Norm norm_of(const char* op, const char* kind) {
  constexpr const char* KINDS[] = {"rms", "layer"};
  return Norm(index_of(op, "kind", kind, KINDS));
}

inline Activation activation_of(const char* op, const char* activation) {
  constexpr const char* FUNCTIONS[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "relu2"};
  return Activation(index_of(op, "activation", activation, FUNCTIONS));
}

}  // namespace ternc
