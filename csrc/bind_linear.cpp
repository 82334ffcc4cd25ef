// torch tensors -> the linear kernels: the CPU implementations of ternc::linear and linears1..4.
#include "bind_held.h"
#include "entry.h"

namespace ternc {

void multiply(const Input& x, int64_t activation_bits, const HeldProduct* held, size_t count) {
  Few<Product> products;
  for (size_t i = 0; i < count; ++i) products.push_back({&held[i].held, held[i].out});
  multiply(x, activation_bits, products);
}

void check_input(const char* op, const Shape& x, int64_t activation_bits) {
  TERNC_CHECK(x.dims >= 1, "ternc::", op, ": x is a scalar; it needs a dimension of features");
  TERNC_CHECK(activation_bits == 8 || activation_bits == 4 || activation_bits == 0, "ternc::", op,
              ": activation_bits=", activation_bits, ", not 8, 4 or 0");
}

namespace {

// The weight as it is read, a new y for it, and its bias.
HeldProduct product_of(const char* op, const Shape& x, ScalarType type, WeightTensors held,
                       const std::optional<Tensor>& bias) {
  const int64_t rows = held.weight.rows;
  HeldProduct product{std::move(held), empty(x, rows, type), {}, {}, {}};
  product.out = {product.y.mutable_data_ptr(), dtype_of(type, op, "x"), nullptr, Dtype::f32,
                 nullptr};
  if (bias.has_value()) {
    const Shape shape = bias->shape();
    TERNC_CHECK(shape.dims == 1 && shape.sizes[0] == rows, "ternc::", op, ": bias has ",
                shape.numel(), " elements, wanted [", rows, "]");
    product.bias = dense(*bias);
    product.out.bias = product.bias.const_data_ptr();
    product.out.bias_dtype = dtype_of(bias->scalar_type(), op, "bias");
  }
  return product;
}

void check_layout(const char* op, int64_t layout) {
  TERNC_CHECK(layout > 10, "ternc::", op, ": layout ", layout,
              " (rows) is the form at rest and is not computed on by CPU kernels; "
              "pack the weight for \"cpu\" (layouts 11 to 14 and 18)");
}

// An empty tensor in a list stands for none.
std::optional<Tensor> given(const Tensor& tensor) {
  return tensor.shape().numel() == 0 ? std::nullopt : std::optional<Tensor>(tensor.borrow());
}

// x as floating point, or integers q with their scales; keeps contiguous copies alive.
struct HeldInput {
  Shape shape;
  Tensor x, scale;
  Input input;
};

HeldInput read_input(const char* op, const Tensor& x, const std::optional<Tensor>& sx,
                     int64_t activation_bits, ScalarType dtype) {
  const Shape shape = x.shape();
  check_input(op, shape, activation_bits);
  const int64_t tokens = shape.tokens();
  const ScalarType type = x.scalar_type();
  HeldInput held{shape, dense(x), {}, {nullptr, Dtype::f32, nullptr, tokens, shape.columns()}};
  held.input.values = held.x.const_data_ptr();
  if (sx.has_value()) {
    TERNC_CHECK(type == ScalarType::Char && activation_bits != 0 &&
                    sx->scalar_type() == ScalarType::Float && sx->shape().numel() == tokens,
                "ternc::", op, ": q and its scales are not int8 [..., K] and float32 [..., 1]");
    held.scale = dense(*sx);
    held.input.scale = static_cast<const float*>(held.scale.const_data_ptr());
  } else {
    held.input.dtype = dtype_of(type, op, "x");
    TERNC_CHECK(type == dtype, "ternc::", op, ": x and its outputs differ in dtype");
  }
  return held;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
              const std::optional<Tensor>& multiplier, const std::optional<Tensor>& bias,
              int64_t out_features, int64_t group_size, int64_t activation_bits, int64_t layout) {
  const ScalarType dtype = x.scalar_type();
  const HeldInput held = read_input("linear", x, std::nullopt, activation_bits, dtype);
  check_layout("linear", layout);
  HeldProduct product = product_of("linear", held.shape, dtype,
                                   read_weight("linear", weight, scale, multiplier, out_features,
                                               held.input.columns, group_size, layout),
                                   bias);
  multiply(held.input, activation_bits, &product, 1);
  return std::move(product.y);
}

Tensor linears1(const Tensor& x, const std::optional<Tensor>& sx, const Tensor& weight,
                const Tensor& scale, const std::optional<Tensor>& multiplier,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                int64_t out_features, int64_t group_size, int64_t activation_bits, int64_t layout,
                ScalarType dtype) {
  const HeldInput held = read_input("linears1", x, sx, activation_bits, dtype);
  check_layout("linears1", layout);
  HeldProduct product = product_of("linears1", held.shape, dtype,
                                   read_weight("linears1", weight, scale, multiplier, out_features,
                                               held.input.columns, group_size, layout),
                                   bias);
  if (residual.has_value()) {
    const Shape shape = residual->shape();
    TERNC_CHECK(residual->scalar_type() == dtype && shape.dims == held.shape.dims &&
                    shape.numel() == held.input.tokens * out_features,
                "ternc::linears1: the residual has not its output's shape and dtype");
    product.residual = dense(*residual);
    product.out.residual = product.residual.const_data_ptr();
  }
  multiply(held.input, activation_bits, &product, 1);
  return std::move(product.y);
}

}  // namespace

Few<HeldProduct> read_products(const char* op, const Shape& x, size_t count,
                               const PackedLists& lists, ScalarType type) {
  TERNC_CHECK(lists.weights.size() == count && lists.scales.size() == count &&
                  lists.multipliers.size() == count && lists.biases.size() == count &&
                  lists.out_features.size() == count && lists.group_sizes.size() == count &&
                  lists.layouts.size() == count,
              "ternc::", op, ": lists that are not of ", count, " entries");
  const int64_t columns = x.columns();
  Few<HeldProduct> products;
  for (size_t i = 0; i < count; ++i) {
    check_layout(op, lists.layouts[i]);
    products.push_back(product_of(
        op, x, type,
        read_weight(op, lists.weights[i], lists.scales[i], given(lists.multipliers[i]),
                    lists.out_features[i], columns, lists.group_sizes[i], lists.layouts[i]),
        given(lists.biases[i])));
  }
  return products;
}

namespace {

// ternc::linears<N>: a tuple of as many tensors as there are entries in I.
template <size_t... I>
std::tuple<OneTensor<I>...> linears(const Tensor& x, const std::optional<Tensor>& sx,
                                    const Few<Tensor>& weights, const Few<Tensor>& scales,
                                    const Few<Tensor>& multipliers, const Few<Tensor>& biases,
                                    const Few<int64_t>& out_features,
                                    const Few<int64_t>& group_sizes, int64_t activation_bits,
                                    const Few<int64_t>& layouts, ScalarType dtype) {
  const HeldInput held = read_input("linears", x, sx, activation_bits, dtype);
  const PackedLists lists{weights, scales, multipliers, biases, out_features, group_sizes, layouts};
  Few<HeldProduct> products = read_products("linears", held.shape, sizeof...(I), lists, dtype);
  multiply(held.input, activation_bits, products.begin(), products.size());
  return {std::move(products[I].y)...};
}

constexpr auto linears2 = &linears<0, 1>;
constexpr auto linears3 = &linears<0, 1, 2>;
constexpr auto linears4 = &linears<0, 1, 2, 3>;

}  // namespace
}  // namespace ternc

TERNC_ENTRY(linear, &ternc::linear)
TERNC_ENTRY(linears1, &ternc::linears1)
TERNC_ENTRY(linears2, ternc::linears2)
TERNC_ENTRY(linears3, ternc::linears3)
TERNC_ENTRY(linears4, ternc::linears4)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("linear", ternc::boxed<ternc::linear>);
  m.impl("linears1", ternc::boxed<ternc::linears1>);
  m.impl("linears2", ternc::boxed<ternc::linears2>);
  m.impl("linears3", ternc::boxed<ternc::linears3>);
  m.impl("linears4", ternc::boxed<ternc::linears4>);
}
