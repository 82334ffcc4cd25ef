// torch tensors -> the one-pass kernels and the products behind them: the CPU implementations of
// ternc::token_linears1..4.
//
//   x --norm--> q in the memory of the call --products--> y_i, or act(y_0) * y_1 in place of y_0
#include "bind_held.h"
#include "bind_rows.h"
#include "entry.h"

namespace ternc {
namespace {

constexpr const char* OP = "token_linears";
constexpr int BITS = 8;

// What is multiplied: x, or the integers of its norm; keeps either alive.
struct TokenInput {
  const Tensor& x;
  Tensor held;
  Scratch<int8_t> q;
  Scratch<float, 256> scale;
  Input input;

  TokenInput(const Tensor& given, const Shape& shape) : x(given) {
    input = {nullptr, dtype_of(x.scalar_type(), OP, "x"), nullptr, shape.tokens(), shape.columns()};
  }

  void take() {
    held = dense(x);
    input.values = held.const_data_ptr();
  }

  void normalise(const std::optional<Tensor>& gain, const std::optional<Tensor>& shift, Norm kind,
                 double eps, double gain_offset, bool round_first) {
    const RowsOf rows(OP, "x", x);
    const ColumnsOf gains(OP, "gain", gain, input.columns, float(gain_offset));
    const ColumnsOf shifts(OP, "shift", shift, input.columns, 0.0f);
    const QuantizedRows out{q.reserve(input.tokens * input.columns), scale.reserve(input.tokens),
                            BITS};
    const NormArgs args{
        rows.rows,     input.columns, kind,    float(eps),   gains.vector,
        shifts.vector, round_first,   nullptr, {nullptr, 0}, out,
    };
    over_tokens(isa().kernels->norm, args, input.tokens);
    input.values = out.q, input.scale = out.scale;
  }
};

void activate_in_place(const Few<HeldProduct>& products, const char* activation, int64_t tokens) {
  const int64_t rows = products[0].held.weight.rows;
  const bool gated = products.size() == 2;
  TERNC_CHECK(!gated || products[1].held.weight.rows == rows, "ternc::", OP, ": ", activation,
              " of weights that differ in rows");
  const Output &gate = products[0].out, &up = products[products.size() - 1].out;
  const ActivateArgs args{
      {gate.values, gate.dtype, rows},
      {gated ? up.values : nullptr, gate.dtype, rows},
      rows,
      activation_of(OP, activation),
      {nullptr, 0},
      {nullptr, nullptr, BITS},
      gate.values,
  };
  over_tokens(isa().kernels->activate, args, tokens);
}

// ternc::token_linears<N>: a tuple of as many tensors as there are entries in I.
template <size_t... I>
std::tuple<OneTensor<I>...> token_linears(
    const Tensor& x, const std::optional<Tensor>& gain, const std::optional<Tensor>& shift,
    const char* kind, double eps, double gain_offset, bool round_first, const char* activation,
    const Few<Tensor>& weights, const Few<Tensor>& scales, const Few<Tensor>& multipliers,
    const Few<Tensor>& biases, const Few<int64_t>& out_features, const Few<int64_t>& group_sizes,
    const Few<int64_t>& layouts) {
  const Shape shape = x.shape();
  check_input(OP, shape, BITS);
  const bool activates = *activation != '\0';
  const bool gated = activates && weights.size() == 2;
  TERNC_CHECK(!activates || sizeof...(I) == 1, "ternc::", OP, ": ", activation, " of ",
              weights.size(), " weights");
  const PackedLists lists{weights, scales, multipliers, biases, out_features, group_sizes, layouts};
  Few<HeldProduct> products =
      read_products(OP, shape, gated ? 2 : sizeof...(I), lists, x.scalar_type());
  TokenInput held(x, shape);
  if (*kind != '\0')
    held.normalise(gain, shift, norm_of(OP, kind), eps, gain_offset, round_first);
  else
    held.take();
  multiply(held.input, BITS, products.begin(), products.size());
  if (activates) activate_in_place(products, activation, held.input.tokens);
  return {std::move(products[I].y)...};
}

constexpr auto token_linears1 = &token_linears<0>;
constexpr auto token_linears2 = &token_linears<0, 1>;
constexpr auto token_linears3 = &token_linears<0, 1, 2>;
constexpr auto token_linears4 = &token_linears<0, 1, 2, 3>;

}  // namespace
}  // namespace ternc

TERNC_ENTRY(token_linears1, ternc::token_linears1)
TERNC_ENTRY(token_linears2, ternc::token_linears2)
TERNC_ENTRY(token_linears3, ternc::token_linears3)
TERNC_ENTRY(token_linears4, ternc::token_linears4)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("token_linears1", ternc::boxed<ternc::token_linears1>);
  m.impl("token_linears2", ternc::boxed<ternc::token_linears2>);
  m.impl("token_linears3", ternc::boxed<ternc::token_linears3>);
  m.impl("token_linears4", ternc::boxed<ternc::token_linears4>);
}
