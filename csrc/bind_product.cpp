// x, packed weights -> their products, on torch's threads.
//
//   x --quantize, widen or split, once, over tokens--> Tokens --one parallel region over the blocks
//   of every weight--> y_i
#include "bind_product.h"

namespace ternc {
namespace {

// Multiply-adds that are worth waking a second thread for: about 5 us on one.
constexpr int64_t WORK_PER_THREAD = 1 << 20;
constexpr int64_t TOKENS_PER_PIECE = 2 * TILE_TOKENS;
constexpr int64_t PAGE = 4096;
constexpr int64_t UNIT_BYTES = 64;  // of a step: what a unit of work is counted in

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
  int64_t blocks = 0, units = 0;
  for (const Job<Args>& job : jobs) blocks += job.blocks, units += job.blocks * job.units;
  const bool whole = tokens <= TOKENS_PER_PIECE || blocks >= 4 * torch::stable::get_num_threads();
  const int64_t pieces = whole ? 1 : ceil_div(tokens, TOKENS_PER_PIECE);
  const int64_t piece = whole ? tokens : TOKENS_PER_PIECE;
  const int64_t work = UNIT_BYTES * stride * piece;
  const int64_t grain = work > WORK_PER_THREAD ? 1 : WORK_PER_THREAD / (work > 0 ? work : 1);
  parallel_for(units * pieces, grain, [&](int64_t begin, int64_t end) {
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
  const int64_t stride = plan.stride, value = size_of(x.dtype);
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
                       const Few<Product>& products) {
  const int64_t stride = ceil_div(x.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const bool in_place = x.scale != nullptr && stride == x.columns;
  const bool tiled = kernels.tile_token != nullptr && x.tokens >= MIN_TILE_TOKENS;
  bool keeps_q = !tiled;
  // Sums of q for each size of group among the weights.
  Few<GroupSums> sizes;
  Few<size_t> size_at;
  int64_t all_groups = 0;
  for (const Product& product : products) {
    const Weight& weight = product.held->weight;
    const bool from_tiles = tiled && reads_tiles(product.held->planes, weight);
    keeps_q = keeps_q || !from_tiles;
    size_t i = 0;
    while (i < sizes.size() && sizes[i].group_size != weight.group_size) ++i;
    if (i == sizes.size()) {
      sizes.push_back({weight.group_size, weight.groups, nullptr, false});
      all_groups += weight.groups;
    }
    GroupSums& size = sizes.items[i];
    size.wanted = size.wanted || !from_tiles || weight.multiplier == nullptr;
    size_at.push_back(i);
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
  parallel_for(x.tokens, token_grain(x.columns),
               [&](int64_t begin, int64_t end) { prepare_tokens(plan, begin, end); });
  Few<Job<LinearI8Args>> jobs;
  for (size_t i = 0; i < products.size(); ++i) {
    const Tokens tokens = {q, scale, sizes[size_at[i]].sums, x.tokens, stride, plan.tiles};
    jobs.push_back(job_of(
        kernels.linear_i8, *products[i].held,
        LinearI8Args{products[i].held->weight, tokens, products[i].out, preferred_prefetch()}));
  }
  split(jobs, x.tokens, stride);
}

void multiply_floats(const Kernels& kernels, const Input& x, const Few<Product>& products) {
  const int64_t stride = ceil_div(x.columns, STEP_COLUMNS) * STEP_COLUMNS;
  const Scratch<float, 16384> wide(x.tokens * stride);
  parallel_for(x.tokens, token_grain(stride), [&](int64_t begin, int64_t end) {
    kernels.widen(x.values, x.dtype, x.columns, wide.get(), stride, begin, end);
  });
  Few<Job<LinearF32Args>> jobs;
  for (const Product& product : products)
    jobs.push_back(job_of(kernels.linear_f32, *product.held,
                          LinearF32Args{product.held->weight, wide.get(), stride, product.out,
                                        preferred_prefetch()}));
  split(jobs, x.tokens, stride);
}

constexpr int64_t MIN_SPLIT_CODES = 1 << 17;  // digits' own steps take about 0.6 us
// Their parts stay in L2 until they are joined.
constexpr int64_t SPLIT_TOKENS = 16;

// Tokens as integers of `digits` digits.
void multiply_digits(const Kernels& kernels, const Input& x, int digits,
                     const Few<Product>& products) {
  const int64_t count = x.tokens * digits;
  const Scratch<int8_t, 32768> q(count * x.columns);
  float scale[SPLIT_TOKENS * MAX_DIGITS];
  const auto over_tokens = [&](int64_t values, const auto& body) {
    parallel_for(x.tokens, token_grain(values), body);
  };
  over_tokens(digits * x.columns, [&](int64_t begin, int64_t end) {
    kernels.split({x.values, x.dtype, x.columns, digits, q.get(), scale}, begin, end);
  });
  int64_t rows = 0;
  for (const Product& product : products) rows += product.held->weight.rows;
  const Scratch<float, 16384> sums(count * rows);
  Few<Product> parts;
  float* next = sums.get();
  for (const Product& product : products) {
    parts.push_back({product.held, {next, Dtype::f32, nullptr, Dtype::f32, nullptr, true}});
    next += count * product.held->weight.rows;
  }
  multiply_integers(kernels, {q.get(), Dtype::f32, scale, count, x.columns}, 8, parts);
  over_tokens(digits * rows, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < products.size(); ++i)
      kernels.join({static_cast<const float*>(parts[i].out.values), digits,
                    products[i].held->weight.rows, products[i].out},
                   begin, end);
  });
}

// Tokens [begin, end) of x, and where their products go.
Input tokens_from(const Input& x, int64_t begin, int64_t end) {
  Input part = x;
  part.values = static_cast<const char*>(x.values) + begin * x.columns * size_of(x.dtype);
  part.tokens = end - begin;
  return part;
}
Few<Product> products_from(const Few<Product>& products, int64_t begin) {
  Few<Product> parts;
  for (Product part : products) {
    const int64_t bytes = begin * part.held->weight.rows * size_of(part.out.dtype);
    part.out.values = static_cast<char*>(part.out.values) + bytes;
    if (part.out.residual != nullptr)
      part.out.residual = static_cast<const char*>(part.out.residual) + bytes;
    parts.push_back(part);
  }
  return parts;
}

// Floating-point x: as integers where the kernels have that and the tokens allow it.
void multiply_real(const Kernels& kernels, const Input& x, const Few<Product>& products) {
  int64_t rows = 0;
  for (const Product& product : products) rows += product.held->weight.rows;
  if (kernels.split == nullptr || rows * x.columns < MIN_SPLIT_CODES)
    return multiply_floats(kernels, x, products);
  const auto digits_of = [&](int64_t token) {
    return kernels.digits(x.values, x.dtype, token * x.columns, x.columns);
  };
  for (int64_t begin = 0, end; begin < x.tokens; begin = end) {
    const int digits = digits_of(begin);
    for (end = begin + 1; end < x.tokens && end < begin + SPLIT_TOKENS && digits_of(end) == digits;)
      ++end;
    const Input part = tokens_from(x, begin, end);
    if (digits > 0)
      multiply_digits(kernels, part, digits, products_from(products, begin));
    else
      multiply_floats(kernels, part, products_from(products, begin));
  }
}

}  // namespace

void multiply(const Input& x, int64_t activation_bits, const Few<Product>& products) {
  const Isa& used = isa();
  if (x.tokens > 0 && activation_bits == 0) multiply_real(*used.kernels, x, products);
  if (x.tokens > 0 && activation_bits != 0)
    multiply_integers(*used.kernels, x, int(activation_bits), products);
  for (const Product& product : products) record_kernel(product.held->weight.bytes, &used);
}

}  // namespace ternc
