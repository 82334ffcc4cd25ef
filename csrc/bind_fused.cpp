// torch tensors -> the one-pass kernels: the CPU implementations of ternc::norm_quantize,
// activate_quantize and hadamard.
#include <cstring>

#include "bind_rows.h"
#include "entry.h"

namespace ternc {
namespace {

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
  const NormArgs args{
      rows.rows,         columns,       norm_of(op, kind), float(eps),
      gains.vector,      biases.vector, round_first,       keep ? y.mutable_data_ptr() : nullptr,
      rotation.rotation, out.rows,
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
  const ActivateArgs args{
      gates.rows,        ups.has_value() ? ups->rows : Rows{nullptr, gates.rows.dtype, 0},
      columns,           activation_of(op, activation),
      rotation.rotation, out.rows,
      nullptr,
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
