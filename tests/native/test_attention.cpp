// attention: blocks of queries, spans of keys, causal or not, and pairs of queries, masked or not,
// against float64.
#include <algorithm>
#include <cmath>

#include "harness.h"
#include "tests.h"

namespace ternc::tests {
namespace {

struct Shape {
  int64_t batch, heads, key_heads, queries, keys, columns, value_columns;
};
constexpr Shape SHAPES[] = {
    {1, 1, 1, 1, 1, 1, 1},     {2, 2, 1, 3, 5, 7, 6},      {1, 4, 2, 33, 70, 24, 5},
    {1, 1, 1, 70, 33, 16, 16}, {1, 2, 2, 64, 300, 12, 20}, {1, 1, 1, 300, 300, 8, 9},
};

Buffer<float> random_floats(Random& random, int64_t count) {
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = 2.0f * random.normal();
  return values;
}

// Largest distance of y from softmax(q k^T * scale) v of one query.
double query_error(const AttentionArgs& args, int64_t batch, int64_t head, int64_t query) {
  const int64_t shared = args.heads / args.key_heads;
  const int64_t key_head = batch * args.key_heads + head / shared;
  const float* q = args.q + ((batch * args.heads + head) * args.queries + query) * args.columns;
  const float* k = args.k + key_head * args.keys * args.columns;
  const float* v = args.v + key_head * args.keys * args.value_columns;
  const float* y =
      args.y + ((batch * args.queries + query) * args.heads + head) * args.value_columns;
  const int64_t seen = args.causal ? std::min(query + 1, args.keys) : args.keys;
  const uint8_t* mask =
      args.mask + batch * args.mask_batch + head * args.mask_head + query * args.mask_query;
  std::vector<double> shares(static_cast<size_t>(seen));
  double total = 0.0, worst = 0.0;
  for (int64_t j = 0; j < seen; ++j) {
    double score = 0.0;
    for (int64_t c = 0; c < args.columns; ++c) score += double(q[c]) * k[j * args.columns + c];
    const bool hidden = args.mask != nullptr && mask[j * args.mask_key] == 0;
    shares[size_t(j)] = hidden ? -INFINITY : score * double(args.scale);
  }
  const double top = *std::max_element(shares.begin(), shares.end());
  for (double& share : shares) total += share = std::exp(share - top);
  for (int64_t c = 0; c < args.value_columns; ++c) {
    double value = 0.0;
    for (int64_t j = 0; j < seen; ++j)
      value += shares[size_t(j)] / total * v[j * args.value_columns + c];
    worst = std::max(worst, std::fabs(double(y[c]) - value));
  }
  return std::isnan(double(y[0])) ? INFINITY : worst;
}

// All queries by `run`, in `count` pieces of work with `floats` of scratch each.
template <class Run>
void run_on_threads(const AttentionArgs& args, int64_t count, int64_t floats, const Run& run) {
  on_threads([&](int i) {
    const Buffer<float> scratch(floats);
    run(args, piece_begin(count, i), piece_begin(count, i + 1), scratch.data());
  });
}

void expect_close(const AttentionArgs& args, int64_t batch) {
  double worst = 0.0;
  for (int64_t head = 0; head < batch * args.heads; ++head)
    for (int64_t query = 0; query < args.queries; ++query)
      worst = std::max(worst, query_error(args, head / args.heads, head % args.heads, query));
  expect(worst < 2e-5, "attention: off by %.3g (%lld queries, %lld keys, %lld columns, causal %d)",
         worst, (long long)args.queries, (long long)args.keys, (long long)args.columns,
         args.causal);
}

// Masks that show key 0 to every query, so that there is a softmax to compare with.
Buffer<uint8_t> random_mask(Random& random, int64_t rows, int64_t keys) {
  Buffer<uint8_t> mask(rows * keys);
  for (int64_t i = 0; i < rows * keys; ++i) mask[i] = i % keys == 0 || random.normal() > 0.5f;
  return mask;
}

void check_attention(const Kernels& kernels, const Shape& shape, bool causal, Random& random) {
  const int64_t heads = shape.batch * shape.heads, key_heads = shape.batch * shape.key_heads;
  const Buffer<float> q = random_floats(random, heads * shape.queries * shape.columns);
  const Buffer<float> k = random_floats(random, key_heads * shape.keys * shape.columns);
  const Buffer<float> v = random_floats(random, key_heads * shape.keys * shape.value_columns);
  const Buffer<float> y(heads * shape.queries * shape.value_columns);
  AttentionArgs args{q.data(),      k.data(),
                     v.data(),      y.data(),
                     shape.heads,   shape.key_heads,
                     shape.queries, shape.keys,
                     shape.columns, shape.value_columns,
                     0.4f,          causal};
  run_on_threads(args, heads * ceil_div(shape.queries, kernels.query_rows),
                 attention_floats(shape.columns, shape.value_columns), kernels.attention);
  expect_close(args, shape.batch);
  const int64_t shared = shape.heads / shape.key_heads * shape.queries;
  const int64_t pairs = key_heads * ceil_div(shared, QUERY_PAIR);
  const int64_t floats = attention_row_floats(shape.keys);
  run_on_threads(args, pairs, floats, kernels.attention_rows);
  expect_close(args, shape.batch);
  const Buffer<uint8_t> mask = random_mask(random, heads * shape.queries, shape.keys);
  args.mask = mask.data();
  args.mask_key = 1;
  args.mask_query = shape.keys;
  args.mask_head = shape.queries * args.mask_query;
  args.mask_batch = shape.heads * args.mask_head;
  run_on_threads(args, pairs, floats, kernels.attention_rows);
  expect_close(args, shape.batch);
}

}  // namespace

void test_attention(const Kernels& kernels) {
  Random random(11);
  for (const Shape& shape : SHAPES)
    for (const bool causal : {false, true}) check_attention(kernels, shape, causal, random);
}

}  // namespace ternc::tests
