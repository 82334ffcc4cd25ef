// torch tensors -> kernel arguments: the CPU implementations of ternc::quantize_act, dequantize,
// embedding and fit. The schemas are defined in runtime/ops; threads are torch's own.
#include "bind.h"

#include "entry.h"

namespace ternc {
namespace {

void run_parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  parallel_for(count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

std::tuple<Tensor, Tensor> quantize_act(const Tensor& x, int64_t bits) {
  const Shape shape = x.shape();
  TERNC_CHECK(shape.dims >= 1,
              "ternc::quantize_act: x is a scalar; it needs a dimension of features");
  TERNC_CHECK(bits == 8 || bits == 4, "ternc::quantize_act: bits=", bits, ", not 8 or 4");
  const Dtype dtype = dtype_of(x.scalar_type(), "quantize_act", "x");
  const Tensor input = dense(x);
  const int64_t columns = shape.columns();
  Tensor q = empty(shape, columns, ScalarType::Char);
  Tensor scale = empty(shape, 1, ScalarType::Float);
  const Tokens out{static_cast<int8_t*>(q.mutable_data_ptr()),
                   static_cast<float*>(scale.mutable_data_ptr()), nullptr, shape.tokens(), columns};
  const QuantizeArgs args{input.const_data_ptr(), dtype, columns, columns, 1, int(bits), out};
  const Kernels& kernels = *isa().kernels;
  parallel_for(out.count, token_grain(columns),
               [&](int64_t begin, int64_t end) { kernels.quantize(args, begin, end); });
  return {std::move(q), std::move(scale)};
}

Tensor dequantize(const Tensor& weight, const Tensor& scale,
                  const std::optional<Tensor>& multiplier, int64_t out_features,
                  int64_t in_features, int64_t group_size, int64_t layout, ScalarType dtype) {
  const WeightTensors held = read_weight("dequantize", weight, scale, multiplier, out_features,
                                         in_features, group_size, layout);
  const Dtype type = dtype_of(dtype, "dequantize", "dtype");
  Tensor w = matrix(out_features, in_features, dtype);
  const Isa& used = isa();
  const DequantizeArgs args{held.weight, held.planes, layout < 10, w.mutable_data_ptr(), type};
  parallel_for(out_features, token_grain(in_features),
               [&](int64_t begin, int64_t end) { used.kernels->dequantize(args, begin, end); });
  record_kernel(weight.const_data_ptr(), &used);
  return w;
}

Tensor embedding(const Tensor& indices, const Tensor& weight, const Tensor& scale,
                 const std::optional<Tensor>& multiplier, int64_t num_embeddings,
                 int64_t embedding_dim, int64_t group_size, int64_t layout, ScalarType dtype) {
  const WeightTensors held = read_weight("embedding", weight, scale, multiplier, num_embeddings,
                                         embedding_dim, group_size, layout);
  const Dtype type = dtype_of(dtype, "embedding", "dtype");
  const ScalarType given = indices.scalar_type();
  TERNC_CHECK(given == ScalarType::Long || given == ScalarType::Int,
              "ternc::embedding: indices are ", torch::headeronly::toString(given),
              ", not int64 or int32");
  const Tensor wide =
      given == ScalarType::Long ? indices.borrow() : converted(indices, ScalarType::Long);
  const Tensor held_indices = dense(wide);
  const Shape shape = indices.shape();
  const int64_t count = shape.numel(), dims = shape.dims;
  const int64_t* index = static_cast<const int64_t*>(held_indices.const_data_ptr());
  for (int64_t i = 0; i < count; ++i)
    TERNC_CHECK(index[i] >= 0 && index[i] < num_embeddings, "ternc::embedding: index ", index[i],
                " is out of range for ", num_embeddings, " rows");
  TERNC_CHECK(dims < MAX_DIMS, "ternc::embedding: indices of ", dims, " dimensions");
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS], stride = embedding_dim > 1 ? embedding_dim : 1;
  sizes[dims] = embedding_dim, strides[dims] = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = shape.sizes[d], strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  Tensor rows = allocate(dims + 1, sizes, strides, dtype);
  const Isa& used = isa();
  const DequantizeArgs args{held.weight, held.planes, layout < 10, rows.mutable_data_ptr(),
                            type,        index};
  parallel_for(count, token_grain(embedding_dim),
               [&](int64_t begin, int64_t end) { used.kernels->dequantize(args, begin, end); });
  record_kernel(weight.const_data_ptr(), &used);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> fit_weight(const Tensor& w, int64_t planes, int64_t group_size,
                                              int64_t refine) {
  const Shape shape = w.shape();
  TERNC_CHECK(
      shape.dims == 2 && shape.sizes[0] > 0 && shape.sizes[1] > 0 && shape.sizes[1] <= MAX_COLUMNS,
      "ternc::fit: weight is not a matrix [N, K] with 1 to 131,072 columns");
  TERNC_CHECK(planes >= 1 && planes <= MAX_PLANES && group_size >= -1 && refine >= 0,
              "ternc::fit: planes=", planes, " (1, 2, 3), group_size=", group_size,
              " (columns, 0 = row, -1 = tensor), refine=", refine, " (0 or more)");
  const int64_t rows = shape.sizes[0], columns = shape.sizes[1];
  const int64_t groups = group_size > 0 ? ceil_div(columns, group_size) : 0;
  const Tensor narrow =
      w.scalar_type() == ScalarType::Double ? converted(w, ScalarType::Float) : w.borrow();
  const Tensor input = dense(narrow);
  Tensor codes = matrix(rows, columns, ScalarType::Char);
  Tensor scale = vector(group_size == -1 ? 1 : rows, ScalarType::Float);
  Tensor multiplier = matrix(rows, groups, ScalarType::Byte);
  const FitArgs args{
      input.const_data_ptr(),
      dtype_of(input.scalar_type(), "fit", "weight"),
      rows,
      columns,
      groups > 0 ? group_size : columns,
      groups > 0 ? groups : 1,
      int(planes),
      int(refine),
      groups > 0 ? static_cast<uint8_t*>(multiplier.mutable_data_ptr()) : nullptr,
      static_cast<int8_t*>(codes.mutable_data_ptr()),
  };
  const bool finite = fit(args, group_size == -1, static_cast<float*>(scale.mutable_data_ptr()),
                          *isa().kernels, run_parallel);
  TERNC_CHECK(finite, "ternc::fit: weight [", rows, ", ", columns,
              "] holds NaN or infinity; repair or exclude it");
  return {std::move(codes), std::move(scale), std::move(multiplier)};
}

}  // namespace
}  // namespace ternc

TERNC_ENTRY(quantize_act, &ternc::quantize_act)
TERNC_ENTRY(embedding, &ternc::embedding)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("quantize_act", ternc::boxed<ternc::quantize_act>);
  m.impl("dequantize", ternc::boxed<ternc::dequantize>);
  m.impl("embedding", ternc::boxed<ternc::embedding>);
  m.impl("fit", ternc::boxed<ternc::fit_weight>);
}
