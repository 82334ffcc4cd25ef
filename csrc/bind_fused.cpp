// torch tensors -> the one-pass kernels: the CPU implementations of ternc::norm_quantize,
// activate_quantize and hadamard.
#include <cstring>

#include "bind_rows.h"
#include "entry.h"

namespace ternc {
namespace {

// The rotation of an op, its signs readable up to padded(K).
struct RotationOf {
  Tensor held;
  Scratch<int8_t> own;
  Rotation rotation{nullptr, 0};

  RotationOf(const char* op, const std::optional<Tensor>& signs, int64_t block, int64_t columns) {
    if (block == 0) return;
    TERNC_CHECK(block > 0 && block <= MAX_HADAMARD && (block & (block - 1)) == 0, "ternc::", op,
                ": block=", block, " is not a power of two up to 4096");
    TERNC_CHECK(columns % block == 0, "ternc::", op, ": block=", block, " does not divide width ",
                columns);
    rotation.block = block;
    if (!signs.has_value()) return;
    TERNC_CHECK(signs->scalar_type() == ScalarType::Char && signs->shape().numel() == columns,
                "ternc::", op, ": signs are not int8 [", columns, "] of +1 and -1");
    held = dense(*signs);
    rotation.signs = static_cast<const int8_t*>(held.const_data_ptr());
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

  QuantizedTensors(const char* op, const Shape& x, int64_t bits)
      : q(empty(x, x.columns(), ScalarType::Char)),
        scale(empty(x, 1, ScalarType::Float)),
        rows{static_cast<int8_t*>(q.mutable_data_ptr()),
             static_cast<float*>(scale.mutable_data_ptr()), int(bits)} {
    TERNC_CHECK(bits == 8 || bits == 4, "ternc::", op, ": bits=", bits, ", not 8 or 4");
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
  const int64_t columns = rows.shape.columns();
  const ColumnsOf gains(op, "gain", gain, columns, float(gain_offset));
  const ColumnsOf biases(op, "bias", bias, columns, 0.0f);
  const RotationOf rotation(op, signs, block, columns);
  QuantizedTensors out(op, rows.shape, bits);
  Tensor y = keep ? empty(rows.shape, columns, x.scalar_type()) : vector(0, x.scalar_type());
  const NormArgs args{
      rows.rows,         columns,       norm_of(op, kind), float(eps),
      gains.vector,      biases.vector, round_first,       keep ? y.mutable_data_ptr() : nullptr,
      rotation.rotation, out.rows,
  };
  over_tokens(isa().kernels->norm, args, rows.shape.tokens());
  return {std::move(y), std::move(out.q), std::move(out.scale)};
}

std::tuple<Tensor, Tensor> activate_quantize(const Tensor& gate, const std::optional<Tensor>& up,
                                             const char* activation,
                                             const std::optional<Tensor>& signs, int64_t block,
                                             int64_t bits) {
  const char* op = "activate_quantize";
  const RowsOf gates(op, "gate", gate);
  const int64_t columns = gates.shape.columns(), tokens = gates.shape.tokens();
  std::optional<RowsOf> ups;
  if (up.has_value()) {
    ups.emplace(op, "up", *up);
    TERNC_CHECK(ups->rows.dtype == gates.rows.dtype && ups->shape.dims == gates.shape.dims &&
                    ups->shape.tokens() == tokens && ups->shape.columns() == columns,
                "ternc::", op, ": up differs from gate in dtype or shape");
  }
  const RotationOf rotation(op, signs, block, columns);
  QuantizedTensors out(op, gates.shape, bits);
  const ActivateArgs args{
      gates.rows,        ups.has_value() ? ups->rows : Rows{nullptr, gates.rows.dtype, 0},
      columns,           activation_of(op, activation),
      rotation.rotation, out.rows,
      nullptr,
  };
  over_tokens(isa().kernels->activate, args, tokens);
  return {std::move(out.q), std::move(out.scale)};
}

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& signs, int64_t block) {
  const RowsOf rows("hadamard", "x", x);
  const int64_t columns = rows.shape.columns();
  TERNC_CHECK(block > 0, "ternc::hadamard: block=", block, " is not a power of two up to 4096");
  const RotationOf rotation("hadamard", signs, block, columns);
  Tensor y = empty(rows.shape, columns, x.scalar_type());
  const HadamardArgs args{rows.rows, columns, rotation.rotation, y.mutable_data_ptr()};
  over_tokens(isa().kernels->hadamard, args, rows.shape.tokens());
  return y;
}

}  // namespace
}  // namespace ternc

TERNC_ENTRY(norm_quantize, &ternc::norm_quantize)
TERNC_ENTRY(activate_quantize, &ternc::activate_quantize)
TERNC_ENTRY(hadamard, &ternc::hadamard)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("norm_quantize", ternc::boxed<ternc::norm_quantize>);
  m.impl("activate_quantize", ternc::boxed<ternc::activate_quantize>);
  m.impl("hadamard", ternc::boxed<ternc::hadamard>);
}
