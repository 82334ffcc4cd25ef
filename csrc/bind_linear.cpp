// torch tensors -> the linear kernels: the CPU implementations of ternc::linear and linears1..4.
//
//   x --quantize or widen, once, over tokens--> Tokens --one parallel region over the blocks of
//   every weight--> y_i
#include "bind.h"
#include "entry.h"

namespace ternc {
namespace {

// Multiply-adds that are worth waking a second thread for: about 5 us on one.
constexpr int64_t WORK_PER_THREAD = 1 << 20;
constexpr int64_t TOKENS_PER_PIECE = 2 * TILE_TOKENS;
constexpr int64_t PAGE = 4096;
constexpr int64_t UNIT_BYTES = 64;  // of a step: what a unit of work is counted in

// One weight of a call: what the kernels read, and where its result goes.
struct Product {
  WeightTensors held;
  Tensor y;
  std::optional<Tensor> bias, residual;  // kept alive
  Output out;
};

// The blocks of one weight and the kernel for them; a block is `units` units of work.
template <class Args>
struct Job {
  void (*kernel)(const Args&, const Range&);
  Args args;
  int64_t blocks, units;
};

// Splits the blocks of all jobs, and tokens where there are few blocks, over the threads. Token
// pieces are whole tiles from token 0, so that the split never changes which tokens share a
// tile. A block belongs to the thread that has its first unit.
template <class Args>
void split(const Few<Job<Args>>& jobs, int64_t tokens, int64_t stride) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t blocks = 0, units = 0;
  for (const Job<Args>& job : jobs) blocks += job.blocks, units += job.blocks * job.units;
  const int64_t pieces = blocks >= 4 * threads ? 1 : ceil_div(tokens, TOKENS_PER_PIECE);
  const int64_t piece = pieces == 1 ? tokens : TOKENS_PER_PIECE;
  const int64_t work = UNIT_BYTES * stride * piece;
  const int64_t grain = work > WORK_PER_THREAD ? 1 : WORK_PER_THREAD / (work > 0 ? work : 1);
  torch::stable::parallel_for(0, units * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin / units; p * units < end; ++p) {
      const int64_t token_end = (p + 1) * piece < tokens ? (p + 1) * piece : tokens;
      int64_t start = p * units;  // of the job's first block
      for (const Job<Args>& job : jobs) {
        const int64_t from = begin > start ? ceil_div(begin - start, job.units) : 0;
        const int64_t reach = end > start ? ceil_div(end - start, job.units) : 0;
        const int64_t to = reach < job.blocks ? reach : job.blocks;
        if (from < to) job.kernel(job.args, Range{from, to, p * piece, token_end});
        start += job.blocks * job.units;
      }
    }
  });
}

template <class Args>
Job<Args> job_of(void (*const (&kernels)[WEIGHT_KINDS])(const Args&, const Range&),
                 const WeightTensors& held, const Args& args) {
  return {kernels[kind_index(held.planes)], args,
          ceil_div(held.weight.rows, block_rows(held.planes)),
          step_bytes(held.planes) / UNIT_BYTES};
}

// What the products multiply: floating-point x, or integers q with their scales.
struct Input {
  const void* values;  // [tokens, columns]
  Dtype dtype;
  const float* scale;  // null: values are floating point
  int64_t tokens, columns;
};

// The first page that begins at `bytes` or behind.
int8_t* page_of(int8_t* bytes) { return bytes + (-reinterpret_cast<uintptr_t>(bytes)) % PAGE; }

// Tokens that share one size of group: the sums that go with it.
struct GroupSums {
  int64_t group_size, groups;
  int32_t* sums;  // [tokens, groups]
  bool wanted;
};

// q of tokens, where it comes from and what is made of it.
struct TokenPlan {
  const Kernels& kernels;
  const Input& x;
  int bits;
  int64_t stride;
  int8_t* q;  // [tokens, stride]; null: not kept
  float* scale;
  int8_t* tiles;  // null: not wanted
  const Few<GroupSums>& sums;
};

// One token at a time, so that its q goes from L1 into tiles and sums.
void prepare_tokens(const TokenPlan& plan, int64_t begin, int64_t end) {
  const Input& x = plan.x;
  const int64_t stride = plan.stride, value = x.dtype == Dtype::f32 ? 4 : 2;
  const int8_t* given = static_cast<const int8_t*>(x.values);
  const bool in_place = x.scale != nullptr && plan.q == given;
  Scratch<int8_t> row;
  if (plan.q == nullptr) row.reserve(stride);
  for (int64_t t = begin; t < end; ++t) {
    int8_t* q = plan.q != nullptr ? plan.q + t * stride : row.get();
    if (x.scale == nullptr) {
      const Tokens one = {q, plan.scale + t, nullptr, 1, stride};
      plan.kernels.quantize(
          {given + t * x.columns * value, x.dtype, x.columns, x.columns, 1, plan.bits, one}, 0, 1);
    } else if (!in_place) {
      for (int64_t k = 0; k < stride; ++k)
        q[k] = k < x.columns ? given[t * x.columns + k] : int8_t(0);
    }
    if (plan.tiles != nullptr) plan.kernels.tile_token(q, stride, t, plan.tiles);
    for (const GroupSums& s : plan.sums)
      if (s.wanted)
        plan.kernels.sum_groups({q, nullptr, s.sums + t * s.groups, 1, stride}, x.columns,
                                s.group_size, s.groups, 0, 1);
  }
  if (plan.tiles == nullptr || end < x.tokens) return;
  for (int64_t t = x.tokens; t % TILE_TOKENS != 0; ++t)
    plan.kernels.tile_token(nullptr, stride, t, plan.tiles);
}

void multiply_integers(const Kernels& kernels, const Input& x, int bits,
                       const std::vector<Product>& products) {
  const int64_t stride = ceil_div(x.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const bool in_place = x.scale != nullptr && stride == x.columns;
  const bool tiled = kernels.tile_token != nullptr && x.tokens >= MIN_TILE_TOKENS;
  bool keeps_q = !tiled;
  // Sums of q for each size of group among the weights.
  Few<GroupSums> sizes;
  Few<size_t> size_of;
  int64_t all_groups = 0;
  for (const Product& product : products) {
    const Weight& weight = product.held.weight;
    const bool from_tiles = tiled && reads_tiles(product.held.planes, weight);
    keeps_q = keeps_q || !from_tiles;
    size_t i = 0;
    while (i < sizes.size() && sizes[i].group_size != weight.group_size) ++i;
    if (i == sizes.size()) {
      sizes.push_back({weight.group_size, weight.groups, nullptr, false});
      all_groups += weight.groups;
    }
    GroupSums& size = sizes.items[i];
    size.wanted = size.wanted || !from_tiles || weight.multiplier == nullptr;
    size_of.push_back(i);
  }
  const Scratch<int8_t> own_q(in_place || !keeps_q ? 0 : x.tokens * stride);
  const Scratch<float, 256> own_scale(x.scale != nullptr ? 0 : x.tokens);
  const int64_t tile_bytes =
      ceil_div(x.tokens, TILE_TOKENS) * TILE_TOKENS * ceil_div(stride, TILE_COLUMNS) * TILE_COLUMNS;
  const Scratch<int8_t, ALIGNMENT> tiles(tiled ? tile_bytes + PAGE : 0);
  const Scratch<int32_t, 512> sums(x.tokens * all_groups);
  int8_t* q = in_place  ? static_cast<int8_t*>(const_cast<void*>(x.values))
              : keeps_q ? own_q.get()
                        : nullptr;
  float* scale = x.scale != nullptr ? const_cast<float*>(x.scale) : own_scale.get();
  int32_t* next_sums = sums.get();
  for (size_t i = 0; i < sizes.size(); ++i) {
    sizes.items[i].sums = next_sums;
    next_sums += x.tokens * sizes[i].groups;
  }
  const TokenPlan plan = {
      kernels, x, bits, stride, q, scale, tiled ? page_of(tiles.get()) : nullptr, sizes};
  torch::stable::parallel_for(0, x.tokens, token_grain(x.columns), [&](int64_t begin, int64_t end) {
    prepare_tokens(plan, begin, end);
  });
  Few<Job<LinearI8Args>> jobs;
  for (size_t i = 0; i < products.size(); ++i) {
    const Tokens tokens = {q, scale, sizes[size_of[i]].sums, x.tokens, stride, plan.tiles};
    jobs.push_back(job_of(
        kernels.linear_i8, products[i].held,
        LinearI8Args{products[i].held.weight, tokens, products[i].out, preferred_prefetch()}));
  }
  split(jobs, x.tokens, stride);
}

void multiply_floats(const Kernels& kernels, const Input& x, const std::vector<Product>& products) {
  const int64_t stride = ceil_div(x.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const Scratch<float, 16384> wide(x.tokens * stride);
  torch::stable::parallel_for(0, x.tokens, token_grain(stride), [&](int64_t begin, int64_t end) {
    kernels.widen(x.values, x.dtype, x.columns, wide.get(), stride, begin, end);
  });
  Few<Job<LinearF32Args>> jobs;
  for (const Product& product : products)
    jobs.push_back(job_of(
        kernels.linear_f32, product.held,
        LinearF32Args{product.held.weight, wide.get(), stride, product.out, preferred_prefetch()}));
  split(jobs, x.tokens, stride);
}

void multiply(const Input& x, int64_t activation_bits, const std::vector<Product>& products) {
  const Isa& used = isa();
  if (x.tokens > 0) {
    if (activation_bits == 0)
      multiply_floats(*used.kernels, x, products);
    else
      multiply_integers(*used.kernels, x, int(activation_bits), products);
  }
  for (const Product& product : products) record_kernel(product.held.weight.bytes, &used);
}

// The weight as it is read, a new y for it, and its bias.
Product product_of(const char* op, const Tensor& x, ScalarType type, WeightTensors held,
                   std::optional<Tensor> bias) {
  const int64_t rows = held.weight.rows;
  Tensor y = empty(x, rows, type);
  Product product{std::move(held), y, std::nullopt, std::nullopt, {}};
  product.out = {y.mutable_data_ptr(), dtype_of(type, op, "x"), nullptr, Dtype::f32, nullptr};
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == rows, "ternc::", op, ": bias has ",
                    bias->numel(), " elements, wanted [", rows, "]");
    product.bias = dense(*bias);
    product.out.bias = product.bias->const_data_ptr();
    product.out.bias_dtype = dtype_of(bias->scalar_type(), op, "bias");
  }
  return product;
}

void check_input(const char* op, const Tensor& x, int64_t activation_bits) {
  STD_TORCH_CHECK(x.dim() >= 1, "ternc::", op, ": x is a scalar; it needs a dimension of features");
  STD_TORCH_CHECK(activation_bits == 8 || activation_bits == 4 || activation_bits == 0,
                  "ternc::", op, ": activation_bits=", activation_bits, ", not 8, 4 or 0");
}

void check_layout(const char* op, int64_t layout) {
  STD_TORCH_CHECK(layout > 10, "ternc::", op, ": layout ", layout,
                  " (rows) is the form at rest and is not computed on by CPU kernels; "
                  "pack the weight for \"cpu\" (layouts 11 to 14 and 18)");
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
              const std::optional<Tensor>& multiplier, const std::optional<Tensor>& bias,
              int64_t out_features, int64_t group_size, int64_t activation_bits, int64_t layout) {
  check_input("linear", x, activation_bits);
  check_layout("linear", layout);
  const int64_t columns = x.size(x.dim() - 1);
  const Dtype dtype = dtype_of(x.scalar_type(), "linear", "x");
  const Tensor input = dense(x);
  std::vector<Product> products;
  products.push_back(product_of(
      "linear", x, x.scalar_type(),
      read_weight("linear", weight, scale, multiplier, out_features, columns, group_size, layout),
      bias));
  multiply({input.const_data_ptr(), dtype, nullptr, tokens_of(x), columns}, activation_bits,
           products);
  return products[0].y;
}

// An empty tensor in a list stands for none.
std::optional<Tensor> given(const Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<Tensor>(tensor);
}

// x as floating point, or integers q with their scales; keeps contiguous copies alive.
struct HeldInput {
  Tensor x;
  std::optional<Tensor> scale;
  Input input;
};

HeldInput read_input(const char* op, const Tensor& x, const std::optional<Tensor>& sx,
                     int64_t activation_bits, ScalarType dtype) {
  check_input(op, x, activation_bits);
  const int64_t columns = x.size(x.dim() - 1), tokens = tokens_of(x);
  HeldInput held{dense(x), std::nullopt, {nullptr, Dtype::f32, nullptr, tokens, columns}};
  held.input.values = held.x.const_data_ptr();
  if (sx.has_value()) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char && activation_bits != 0 &&
                        sx->scalar_type() == ScalarType::Float && sx->numel() == tokens,
                    "ternc::", op, ": q and its scales are not int8 [..., K] and float32 [..., 1]");
    held.scale = dense(*sx);
    held.input.scale = static_cast<const float*>(held.scale->const_data_ptr());
  } else {
    held.input.dtype = dtype_of(x.scalar_type(), op, "x");
    STD_TORCH_CHECK(x.scalar_type() == dtype, "ternc::", op, ": x and its outputs differ in dtype");
  }
  return held;
}

Tensor linears1(const Tensor& x, const std::optional<Tensor>& sx, const Tensor& weight,
                const Tensor& scale, const std::optional<Tensor>& multiplier,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                int64_t out_features, int64_t group_size, int64_t activation_bits, int64_t layout,
                ScalarType dtype) {
  const HeldInput held = read_input("linears1", x, sx, activation_bits, dtype);
  check_layout("linears1", layout);
  std::vector<Product> products;
  products.push_back(product_of("linears1", x, dtype,
                                read_weight("linears1", weight, scale, multiplier, out_features,
                                            held.input.columns, group_size, layout),
                                bias));
  Product& product = products[0];
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->scalar_type() == dtype && residual->dim() == product.y.dim() &&
                        residual->numel() == held.input.tokens * out_features,
                    "ternc::linears1: the residual has not its output's shape and dtype");
    product.residual = dense(*residual);
    product.out.residual = product.residual->const_data_ptr();
  }
  multiply(held.input, activation_bits, products);
  return product.y;
}

std::vector<Product> several(const Tensor& x, const std::optional<Tensor>& sx, size_t count,
                             const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
                             const std::vector<Tensor>& multipliers,
                             const std::vector<Tensor>& biases,
                             const std::vector<int64_t>& out_features,
                             const std::vector<int64_t>& group_sizes, int64_t activation_bits,
                             const std::vector<int64_t>& layouts, ScalarType dtype) {
  const HeldInput held = read_input("linears", x, sx, activation_bits, dtype);
  STD_TORCH_CHECK(weights.size() == count && scales.size() == count &&
                      multipliers.size() == count && biases.size() == count &&
                      out_features.size() == count && group_sizes.size() == count &&
                      layouts.size() == count,
                  "ternc::linears: lists that are not of ", count, " entries");
  std::vector<Product> products;
  products.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    check_layout("linears", layouts[i]);
    products.push_back(
        product_of("linears", x, dtype,
                   read_weight("linears", weights[i], scales[i], given(multipliers[i]),
                               out_features[i], held.input.columns, group_sizes[i], layouts[i]),
                   given(biases[i])));
  }
  multiply(held.input, activation_bits, products);
  return products;
}

template <size_t>
using OneTensor = Tensor;

// ternc::linears<N>: a tuple of as many tensors as there are entries in I.
template <size_t... I>
std::tuple<OneTensor<I>...> linears(
    const Tensor& x, const std::optional<Tensor>& sx, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& scales, const std::vector<Tensor>& multipliers,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& out_features,
    const std::vector<int64_t>& group_sizes, int64_t activation_bits,
    const std::vector<int64_t>& layouts, ScalarType dtype) {
  const std::vector<Product> products =
      several(x, sx, sizeof...(I), weights, scales, multipliers, biases, out_features, group_sizes,
              activation_bits, layouts, dtype);
  return {products[I].y...};
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
  m.impl("linear", TORCH_BOX(&ternc::linear));
  m.impl("linears1", TORCH_BOX(&ternc::linears1));
  m.impl("linears2", TORCH_BOX(ternc::linears2));
  m.impl("linears3", TORCH_BOX(ternc::linears3));
  m.impl("linears4", TORCH_BOX(ternc::linears4));
}
