// Rows of a tensor, vectors of columns and words: what the one-pass kernels take, read from
// arguments of an op.
#pragma once

#include <cstring>

#include "bind.h"

namespace ternc {

// A str argument as the boxed call hands it over; freed with this object.
class Word {
 public:
  explicit Word(StringHandle handle) : handle_(handle) {}
  Word(const Word&) = delete;
  Word& operator=(const Word&) = delete;
  ~Word() { torch_delete_string(handle_); }

  const char* text() const {
    const char* text = nullptr;
    STD_TORCH_CHECK(torch_string_c_str(handle_, &text) == 0, "ternc: a str argument has no text");
    return text;
  }

 private:
  StringHandle handle_;
};

template <size_t N>
int index_of(const char* op, const char* argument, const char* word,
             const char* const (&names)[N]) {
  size_t i = 0;
  while (i < N && std::strcmp(word, names[i]) != 0) ++i;
  STD_TORCH_CHECK(i < N, "ternc::", op, ": ", argument, "='", word, "' is unknown");
  return int(i);
}

// Tokens of x where they lie, if one stride leads from each to the next; else of a copy.
struct RowsOf {
  Tensor held;
  Rows rows;

  RowsOf(const char* op, const char* name, const Tensor& x) : held(x), rows{} {
    STD_TORCH_CHECK(x.dim() >= 1, "ternc::", op, ": ", name,
                    " is a scalar; it needs a dimension of features");
    rows.dtype = dtype_of(x.scalar_type(), op, name);
    rows.stride = stride_of(x);
    if (rows.stride < 0) held = dense(x), rows.stride = x.size(x.dim() - 1);
    rows.values = held.const_data_ptr();
  }

  // Elements from a token to the next; -1: there is no such number.
  static int64_t stride_of(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    if (x.is_contiguous()) return x.size(last);
    if (x.size(last) > 1 && x.stride(last) != 1) return -1;
    int64_t stride = -1, inner = 1;  // of all dimensions inside of d together: tokens
    for (int64_t d = last - 1; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (stride < 0) stride = x.stride(d);
      if (x.stride(d) != stride * inner) return -1;
      inner *= x.size(d);
    }
    return stride < 0 ? x.size(last) : stride;
  }
};

// A vector [K] of factors or summands; kept alive.
struct ColumnsOf {
  std::optional<Tensor> held;
  ColumnVector vector{nullptr, Dtype::f32, 0.0f};

  ColumnsOf(const char* op, const char* name, const std::optional<Tensor>& t, int64_t columns,
            float offset) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->numel() == columns, "ternc::", op, ": ", name, " has ",
                    t->numel(), " elements, wanted [", columns, "]");
    const bool wide = t->scalar_type() == ScalarType::Double;
    held = dense(wide ? Tensor(torch::stable::to(t->stable(), ScalarType::Float)) : *t);
    vector = {held->const_data_ptr(), dtype_of(held->scalar_type(), op, name), offset};
  }
};

// kernel(args, token_begin, token_end, scratch) over the threads.
template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args,
                 int64_t tokens) {
  torch::stable::parallel_for(0, tokens, token_grain(args.columns),
                              [&](int64_t begin, int64_t end) {
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
