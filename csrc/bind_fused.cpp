// torch tensors -> the one-pass kernels: the CPU implementations of ternc::norm_quantize,
// activate_quantize and hadamard.
#include <cstring>

#include "bind.h"
#include "entry.h"

namespace ternc {
namespace {

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
    held = dense(wide ? torch::stable::to(*t, ScalarType::Float) : *t);
    vector = {held->const_data_ptr(), dtype_of(held->scalar_type(), op, name), offset};
  }
};

// The rotation of an op, its signs readable up to padded(K).
struct RotationOf {
  std::optional<Tensor> held;
  Scratch<int8_t> own;
  Rotation rotation{nullptr, 0};

  RotationOf(const char* op, const std::optional<Tensor>& signs, int64_t block, int64_t columns) {
    if (block == 0) return;
    STD_TORCH_CHECK(block > 0 && block <= MAX_HADAMARD && (block & (block - 1)) == 0, "ternc::", op,
                    ": block=", block, " is not a power of two up to 4096");
    STD_TORCH_CHECK(columns % block == 0, "ternc::", op, ": block=", block,
                    " does not divide width ", columns);
    rotation.block = block;
    if (!signs.has_value()) return;
    STD_TORCH_CHECK(signs->scalar_type() == ScalarType::Char && signs->numel() == columns,
                    "ternc::", op, ": signs are not int8 [", columns, "] of +1 and -1");
    held = dense(*signs);
    rotation.signs = static_cast<const int8_t*>(held->const_data_ptr());
    if (columns == padded(columns)) return;
    own.reserve(padded(columns));
    std::memset(own.get(), 1, size_t(padded(columns)));
    std::memcpy(own.get(), rotation.signs, size_t(columns));
    rotation.signs = own.get();
  }
};

struct QuantizedTensors {
  Tensor q, scale;
  QuantizedRows rows;

  QuantizedTensors(const char* op, const Tensor& x, int64_t bits)
      : q(empty(x, x.size(x.dim() - 1), ScalarType::Char)),
        scale(empty(x, 1, ScalarType::Float)),
        rows{static_cast<int8_t*>(q.mutable_data_ptr()),
             static_cast<float*>(scale.mutable_data_ptr()), int(bits)} {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "ternc::", op, ": bits=", bits, ", not 8 or 4");
  }
};

// kernel(args, token_begin, token_end, scratch) over the threads.
template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args,
                 int64_t tokens) {
  torch::stable::parallel_for(
      0, tokens, token_grain(args.columns), [&](int64_t begin, int64_t end) {
        const Scratch<float, 32768> rows(SCRATCH_ROWS * padded(args.columns));
        kernel(args, begin, end, rows.get());
      });
}

std::tuple<Tensor, Tensor, Tensor> norm_quantize(const Tensor& x, const std::optional<Tensor>& gain,
                                                 const std::optional<Tensor>& bias,
                                                 const char* kind, double eps, double gain_offset,
                                                 bool round_first,
                                                 const std::optional<Tensor>& signs, int64_t block,
                                                 int64_t bits, bool keep) {
  const char* op = "norm_quantize";
  const RowsOf rows(op, "x", x);
  const int64_t columns = x.size(x.dim() - 1);
  const ColumnsOf gains(op, "gain", gain, columns, float(gain_offset));
  const ColumnsOf biases(op, "bias", bias, columns, 0.0f);
  const RotationOf rotation(op, signs, block, columns);
  const QuantizedTensors out(op, x, bits);
  const Tensor y = keep ? empty(x, columns, x.scalar_type()) : no_values(x.scalar_type());
  constexpr const char* KINDS[] = {"rms", "layer"};
  const NormArgs args{
      rows.rows,
      columns,
      Norm(index_of(op, "kind", kind, KINDS)),
      float(eps),
      gains.vector,
      biases.vector,
      round_first,
      keep ? y.mutable_data_ptr() : nullptr,
      rotation.rotation,
      out.rows,
  };
  over_tokens(isa().kernels->norm, args, tokens_of(x));
  return {y, out.q, out.scale};
}

std::tuple<Tensor, Tensor> activate_quantize(const Tensor& gate, const std::optional<Tensor>& up,
                                             const char* activation,
                                             const std::optional<Tensor>& signs, int64_t block,
                                             int64_t bits) {
  const char* op = "activate_quantize";
  const RowsOf gates(op, "gate", gate);
  const int64_t columns = gate.size(gate.dim() - 1);
  std::optional<RowsOf> ups;
  if (up.has_value()) {
    STD_TORCH_CHECK(up->scalar_type() == gate.scalar_type() && up->dim() == gate.dim() &&
                        up->numel() == gate.numel() && up->size(up->dim() - 1) == columns,
                    "ternc::", op, ": up differs from gate in dtype or shape");
    ups.emplace(op, "up", *up);
  }
  const RotationOf rotation(op, signs, block, columns);
  const QuantizedTensors out(op, gate, bits);
  constexpr const char* FUNCTIONS[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "relu2"};
  const ActivateArgs args{
      gates.rows,        ups.has_value() ? ups->rows : Rows{nullptr, gates.rows.dtype, 0},
      columns,           Activation(index_of(op, "activation", activation, FUNCTIONS)),
      rotation.rotation, out.rows,
  };
  over_tokens(isa().kernels->activate, args, tokens_of(gate));
  return {out.q, out.scale};
}

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& signs, int64_t block) {
  const RowsOf rows("hadamard", "x", x);
  const int64_t columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(block > 0, "ternc::hadamard: block=", block, " is not a power of two up to 4096");
  const RotationOf rotation("hadamard", signs, block, columns);
  const Tensor y = empty(x, columns, x.scalar_type());
  const HadamardArgs args{rows.rows, columns, rotation.rotation, y.mutable_data_ptr()};
  over_tokens(isa().kernels->hadamard, args, tokens_of(x));
  return y;
}

// The same, for the dispatcher.
std::tuple<Tensor, Tensor, Tensor> norm_quantize_boxed(
    const Tensor& x, const std::optional<Tensor>& gain, const std::optional<Tensor>& bias,
    StringHandle kind, double eps, double gain_offset, bool round_first,
    const std::optional<Tensor>& signs, int64_t block, int64_t bits, bool keep) {
  return norm_quantize(x, gain, bias, Word(kind).text(), eps, gain_offset, round_first, signs,
                       block, bits, keep);
}

std::tuple<Tensor, Tensor> activate_quantize_boxed(const Tensor& gate,
                                                   const std::optional<Tensor>& up,
                                                   StringHandle activation,
                                                   const std::optional<Tensor>& signs,
                                                   int64_t block, int64_t bits) {
  return activate_quantize(gate, up, Word(activation).text(), signs, block, bits);
}

}  // namespace
}  // namespace ternc

TERNC_ENTRY(norm_quantize, &ternc::norm_quantize)
TERNC_ENTRY(activate_quantize, &ternc::activate_quantize)
TERNC_ENTRY(hadamard, &ternc::hadamard)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("norm_quantize", TORCH_BOX(&ternc::norm_quantize_boxed));
  m.impl("activate_quantize", TORCH_BOX(&ternc::activate_quantize_boxed));
  m.impl("hadamard", TORCH_BOX(&ternc::hadamard));
}
