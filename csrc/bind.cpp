// torch tensors -> kernel arguments: the CPU implementations of the ternc:: operators, through
// LibTorch's stable ABI (one binary for every torch from TORCH_TARGET_VERSION on). The schemas are
// defined in runtime/ops; threads are torch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "ternc.h"

namespace ternc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds that are worth waking a second thread for: about 5 us on one.
constexpr int64_t WORK_PER_THREAD = 1 << 20;
constexpr int64_t VALUES_PER_THREAD = 1 << 15;
constexpr int64_t TOKENS_PER_PIECE = 16;
constexpr size_t ALIGNMENT = 64;

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(ALIGNMENT)); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeAligned>;

template <class T>
Scratch<T> scratch(int64_t count) {
  void* p = ::operator new(size_t(count) * sizeof(T) + ALIGNMENT, std::align_val_t(ALIGNMENT));
  return Scratch<T>(static_cast<T*>(p));
}

const Isa& isa() {
  const char* error = nullptr;
  const Isa* active = active_isa(&error);
  STD_TORCH_CHECK(active != nullptr, error);
  return *active;
}

Dtype dtype_of(ScalarType type, const char* op, const char* name) {
  if (type == ScalarType::Float) return Dtype::f32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "ternc::", op, ": ", name, " is ",
                  torch::headeronly::toString(type), ", not float32, bfloat16 or float16");
  return Dtype::f16;
}

int64_t tokens_of(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
  return count;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

void parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// A packed weight as an op receives it; keeps contiguous copies alive.
struct WeightTensors {
  Tensor bytes, scale;
  std::optional<Tensor> multiplier;
  Weight weight;
  int planes;
};

WeightTensors read_weight(const char* op, const Tensor& bytes, const Tensor& scale,
                          const std::optional<Tensor>& multiplier, int64_t rows, int64_t columns,
                          int64_t group_size, int64_t layout) {
  const bool at_rest = layout < 10;
  const int planes = int(layout % 10);
  STD_TORCH_CHECK((layout >= 1 && layout <= 3) || (layout >= 11 && layout <= 13), "ternc::", op,
                  ": layout ", layout, " is unknown; layouts are 1..3 (rows) and 11..13 (lanes)");
  STD_TORCH_CHECK(columns <= MAX_COLUMNS, "ternc::", op, ": in_features=", columns,
                  " is over 131,072: the integer sum of a row would not fit 32 bits");
  STD_TORCH_CHECK(group_size >= 0 && (at_rest || group_size % STEP_COLUMNS == 0), "ternc::", op,
                  ": group_size=", group_size, " is not a multiple of 4 (layout ", layout, ")");
  const int64_t groups = group_size == 0 ? 1 : ceil_div(columns, group_size);
  const int64_t blocks = at_rest ? rows : ceil_div(rows, block_rows(planes));
  const int64_t block_groups = groups * (at_rest ? 1 : block_rows(planes));
  const int64_t block_bytes = at_rest ? planes * ceil_div(columns, 5)
                                      : ceil_div(columns, STEP_COLUMNS) * step_bytes(planes);
  STD_TORCH_CHECK(bytes.scalar_type() == ScalarType::Byte && bytes.numel() == blocks * block_bytes,
                  "ternc::", op, ": weight holds ", bytes.numel(), " elements; layout ", layout,
                  " of [", rows, ", ", columns, "] is ", blocks * block_bytes, " uint8");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "ternc::", op,
                  ": scale is not float32");
  const bool free_scales = scale.dim() == 2;
  STD_TORCH_CHECK(free_scales ? scale.size(0) == rows && scale.size(1) == groups &&
                                    group_size > 0 && !multiplier.has_value()
                              : scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == rows),
                  "ternc::", op, ": scale has ", scale.numel(), " elements; wanted [1], [", rows,
                  "], or [", rows, ", ", groups, "] without multiplier and with group_size");
  WeightTensors held{dense(bytes), dense(scale), std::nullopt, {}, planes};
  if (multiplier.has_value()) {
    STD_TORCH_CHECK(multiplier->scalar_type() == ScalarType::Byte && group_size > 0 &&
                        multiplier->numel() == blocks * block_groups,
                    "ternc::", op, ": multiplier holds ", multiplier->numel(), " elements; wanted ",
                    blocks * block_groups, " uint8 and group_size > 0");
    held.multiplier = dense(*multiplier);
  }
  held.weight.bytes = static_cast<const uint8_t*>(held.bytes.const_data_ptr());
  held.weight.scale = static_cast<const float*>(held.scale.const_data_ptr());
  held.weight.multiplier =
      held.multiplier ? static_cast<const uint8_t*>(held.multiplier->const_data_ptr()) : nullptr;
  held.weight.scale_kind = free_scales                       ? ScaleKind::group
                           : scale.numel() == 1 && rows != 1 ? ScaleKind::tensor
                                                             : ScaleKind::row;
  held.weight.rows = rows;
  held.weight.columns = columns;
  held.weight.group_size = group_size == 0 ? columns : group_size;
  held.weight.groups = groups;
  return held;
}

// Splits blocks of rows, and tokens where there are few blocks, over the threads. Token pieces are
// multiples of four from token 0, so that the split never changes which tokens share a tile.
template <class Kernel, class Args>
void split(Kernel kernel, const Args& args, int64_t blocks, int64_t tokens, int64_t block_work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = blocks >= 4 * threads ? 1 : ceil_div(tokens, TOKENS_PER_PIECE);
  const int64_t piece = pieces == 1 ? tokens : TOKENS_PER_PIECE;
  const int64_t work = block_work * piece;
  const int64_t grain = work > WORK_PER_THREAD ? 1 : WORK_PER_THREAD / (work > 0 ? work : 1);
  torch::stable::parallel_for(0, blocks * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {
      const int64_t p = item / blocks, first = item % blocks;
      const int64_t count = end - item < blocks - first ? end - item : blocks - first;
      const int64_t last = (p + 1) * piece < tokens ? (p + 1) * piece : tokens;
      kernel(args, Range{first, first + count, p * piece, last});
      item += count;
    }
  });
}

void quantize_tokens(const Kernels& kernels, const QuantizeArgs& args) {
  const int64_t per_token = args.columns > 0 ? args.columns : 1;
  const int64_t grain = VALUES_PER_THREAD / per_token + 1;
  torch::stable::parallel_for(0, args.out.count, grain, [&](int64_t begin, int64_t end) {
    kernels.quantize(args, begin, end);
  });
}

void linear_integer(const Kernels& kernels, const Tensor& x, Dtype dtype, const WeightTensors& held,
                    const Output& out, int bits, int64_t tokens) {
  const Weight& weight = held.weight;
  const int64_t stride = ceil_div(weight.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const auto q = scratch<int8_t>(tokens * stride);
  const auto scale = scratch<float>(tokens);
  const auto sums = scratch<int32_t>(tokens * weight.groups);
  const Tokens quantized{q.get(), scale.get(), sums.get(), tokens, stride};
  quantize_tokens(kernels, {x.const_data_ptr(), dtype, weight.columns, weight.group_size,
                            weight.groups, bits, quantized});
  const int rows = block_rows(held.planes);
  split(kernels.linear_i8[held.planes - 1], LinearI8Args{weight, quantized, out},
        ceil_div(weight.rows, rows), tokens, rows * stride);
}

void linear_float(const Kernels& kernels, const Tensor& x, Dtype dtype, const WeightTensors& held,
                  const Output& out, int64_t tokens) {
  const Weight& weight = held.weight;
  const int64_t stride = ceil_div(weight.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const auto wide = scratch<float>(tokens * stride);
  torch::stable::parallel_for(
      0, tokens, VALUES_PER_THREAD / (stride + 1) + 1, [&](int64_t begin, int64_t end) {
        kernels.widen(x.const_data_ptr(), dtype, weight.columns, wide.get(), stride, begin, end);
      });
  const int rows = block_rows(held.planes);
  split(kernels.linear_f32[held.planes - 1], LinearF32Args{weight, wide.get(), stride, out},
        ceil_div(weight.rows, rows), tokens, rows * stride);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
              const std::optional<Tensor>& multiplier, const std::optional<Tensor>& bias,
              int64_t out_features, int64_t group_size, int64_t activation_bits, int64_t layout) {
  STD_TORCH_CHECK(x.dim() >= 1, "ternc::linear: x is a scalar; it needs a dimension of features");
  const Dtype dtype = dtype_of(x.scalar_type(), "linear", "x");
  STD_TORCH_CHECK(activation_bits == 8 || activation_bits == 4 || activation_bits == 0,
                  "ternc::linear: activation_bits=", activation_bits, ", not 8, 4 or 0");
  STD_TORCH_CHECK(layout > 10, "ternc::linear: layout ", layout,
                  " (rows) is the form at rest and is not computed on by CPU kernels; "
                  "pack the weight for \"cpu\" (layouts 11 to 13)");
  const WeightTensors held = read_weight("linear", weight, scale, multiplier, out_features,
                                         x.size(x.dim() - 1), group_size, layout);
  const Tensor input = dense(x);
  const Tensor y = torch::stable::new_empty(x, shape_with_last(x, out_features));
  Output out{y.mutable_data_ptr(), dtype, nullptr, Dtype::f32};
  std::optional<Tensor> held_bias;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == out_features, "ternc::linear: bias has ",
                    bias->numel(), " elements, wanted [", out_features, "]");
    held_bias = dense(*bias);
    out.bias = held_bias->const_data_ptr();
    out.bias_dtype = dtype_of(bias->scalar_type(), "linear", "bias");
  }
  const Isa& used = isa();
  const int64_t tokens = tokens_of(x);
  if (tokens > 0 && out_features > 0) {
    if (activation_bits == 0)
      linear_float(*used.kernels, input, dtype, held, out, tokens);
    else
      linear_integer(*used.kernels, input, dtype, held, out, int(activation_bits), tokens);
  }
  record_kernel(weight.const_data_ptr(), &used);
  return y;
}

std::tuple<Tensor, Tensor> quantize_act(const Tensor& x, int64_t bits) {
  STD_TORCH_CHECK(x.dim() >= 1,
                  "ternc::quantize_act: x is a scalar; it needs a dimension of features");
  STD_TORCH_CHECK(bits == 8 || bits == 4, "ternc::quantize_act: bits=", bits, ", not 8 or 4");
  const Dtype dtype = dtype_of(x.scalar_type(), "quantize_act", "x");
  const Tensor input = dense(x);
  const int64_t columns = x.size(x.dim() - 1);
  Tensor q = torch::stable::new_empty(x, shape_with_last(x, columns), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, shape_with_last(x, 1), ScalarType::Float);
  const Tokens out{static_cast<int8_t*>(q.mutable_data_ptr()),
                   static_cast<float*>(scale.mutable_data_ptr()), nullptr, tokens_of(x), columns};
  quantize_tokens(*isa().kernels,
                  {input.const_data_ptr(), dtype, columns, columns, 1, int(bits), out});
  return {q, scale};
}

Tensor dequantize(const Tensor& weight, const Tensor& scale,
                  const std::optional<Tensor>& multiplier, int64_t out_features,
                  int64_t in_features, int64_t group_size, int64_t layout, ScalarType dtype) {
  const WeightTensors held = read_weight("dequantize", weight, scale, multiplier, out_features,
                                         in_features, group_size, layout);
  const Dtype type = dtype_of(dtype, "dequantize", "dtype");
  const Tensor w = torch::stable::new_empty(weight, {out_features, in_features}, dtype);
  const Isa& used = isa();
  const DequantizeArgs args{held.weight, held.planes, layout < 10, w.mutable_data_ptr(), type};
  torch::stable::parallel_for(
      0, out_features, VALUES_PER_THREAD / (in_features + 1) + 1,
      [&](int64_t begin, int64_t end) { used.kernels->dequantize(args, begin, end); });
  record_kernel(weight.const_data_ptr(), &used);
  return w;
}

std::tuple<Tensor, Tensor, Tensor> fit_weight(const Tensor& w, int64_t planes, int64_t group_size,
                                              int64_t refine) {
  STD_TORCH_CHECK(w.dim() == 2 && w.size(0) > 0 && w.size(1) > 0 && w.size(1) <= MAX_COLUMNS,
                  "ternc::fit: weight is not a matrix [N, K] with 1 to 131,072 columns");
  STD_TORCH_CHECK(planes >= 1 && planes <= MAX_PLANES && group_size >= -1 && refine >= 0,
                  "ternc::fit: planes=", planes, " (1, 2, 3), group_size=", group_size,
                  " (columns, 0 = row, -1 = tensor), refine=", refine, " (0 or more)");
  const int64_t rows = w.size(0), columns = w.size(1);
  const int64_t groups = group_size > 0 ? ceil_div(columns, group_size) : 0;
  const Tensor input =
      dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
  const Tensor codes = torch::stable::new_empty(w, {rows, columns}, ScalarType::Char);
  const Tensor scale =
      torch::stable::new_empty(w, {group_size == -1 ? 1 : rows}, ScalarType::Float);
  const Tensor multiplier = torch::stable::new_empty(w, {rows, groups}, ScalarType::Byte);
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
                          *isa().kernels, parallel_for);
  STD_TORCH_CHECK(finite, "ternc::fit: weight [", rows, ", ", columns,
                  "] holds NaN or infinity; repair or exclude it");
  return {codes, scale, multiplier};
}

}  // namespace
}  // namespace ternc

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) {
  m.impl("linear", TORCH_BOX(&ternc::linear));
  m.impl("quantize_act", TORCH_BOX(&ternc::quantize_act));
  m.impl("dequantize", TORCH_BOX(&ternc::dequantize));
  m.impl("fit", TORCH_BOX(&ternc::fit_weight));
}
