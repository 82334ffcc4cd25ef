// q, k, v -> softmax(q k^T * scale) v in fp32: a block of queries of one head at a time.
//
// Queries lie in lanes: keys and values are read where they are, a value at a time for all lanes,
// and the softmax needs no sum over lanes. Keys come in spans whose scores stay in L1; sums so far
// are rescaled when a span has a larger score (Milakov and Gimelshein, arXiv:1805.02867).
//
//   queries [D][ROWS] --span of keys--> scores [SPAN][ROWS] --values--> sums [Dv][ROWS] --> y
#pragma once

#include "activation.h"

constexpr int QUERY_VECTORS = 2, ROWS = QUERY_VECTORS * LANES;
constexpr int TILE = ACCUMULATORS / QUERY_VECTORS;  // keys, or columns of values, in registers
static_assert(ROWS <= ATTENTION_ROWS && ATTENTION_SPAN % ROWS == 0);

// What a block of queries knows of its scores: the largest (finite before the first, so that those
// of minus infinity count as nothing), and the sum of their exponentials.
struct Softmax {
  f32 largest[QUERY_VECTORS], sum[QUERY_VECTORS];
};

// One block of queries of one head, and the memory that it is worked on in.
struct QueryBlock {
  const AttentionArgs* args;
  const float *keys, *values;  // of the head
  int64_t first;               // query
  float *queries, *scores, *sums;
};

// Sums over `count` of factors[i * stride + c * step] * vectors[c], for N values of i.
template <int N>
TERNC_INLINE void add_products(f32 (&sum)[N][QUERY_VECTORS], const float* factors, int64_t stride,
                               int64_t step, const float* vectors, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    f32 vector[QUERY_VECTORS];
#pragma GCC unroll 2
    for (int p = 0; p < QUERY_VECTORS; ++p) vector[p] = load_f32(vectors + c * ROWS + p * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32 factor = splat_f32(factors[i * stride + c * step]);
#pragma GCC unroll 2
      for (int p = 0; p < QUERY_VECTORS; ++p) sum[i][p] = fma_f32(factor, vector[p], sum[i][p]);
    }
  }
}

// Scores of the keys from `key` on with the block; those of keys behind a query do not count.
template <int N>
TERNC_NOINLINE void score_keys(const QueryBlock& block, int64_t key, float* scores,
                               f32 (&largest)[QUERY_VECTORS]) {
  const AttentionArgs& args = *block.args;
  f32 sum[N][QUERY_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    for (int p = 0; p < QUERY_VECTORS; ++p) sum[i][p] = splat_f32(0.0f);
  add_products<N>(sum, block.keys + key * args.columns, args.columns, 1, block.queries,
                  args.columns);
  const bool hidden = args.causal && key + N > block.first + 1;
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = float(i);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < QUERY_VECTORS; ++p) {
      if (hidden) {
        const f32 ahead = splat_f32(float(key + i - block.first - p * LANES));
        const f32 never = splat_f32(-__builtin_inff());
        sum[i][p] = select_less(load_f32(lanes), ahead, never, sum[i][p]);
      }
      largest[p] = max_f32(largest[p], sum[i][p]);
      store_f32(scores + i * ROWS + p * LANES, sum[i][p]);
    }
}

// Scores -> their exponentials, which are added up; the sums so far in terms of the new largest.
TERNC_NOINLINE void exponentiate(const QueryBlock& block, int64_t count,
                                 const f32 (&largest)[QUERY_VECTORS], Softmax& softmax) {
  const f32 lowest = splat_f32(-86.0f), zero = splat_f32(0.0f);
  for (int p = 0; p < QUERY_VECTORS; ++p) {
    const f32 rescale = exponential(sub_f32(softmax.largest[p], largest[p]));
    f32 total = mul_f32(softmax.sum[p], rescale);
    softmax.largest[p] = largest[p];
    float* sums = block.sums + p * LANES;
    for (int64_t c = 0; c < block.args->value_columns; ++c)
      store_f32(sums + c * ROWS, mul_f32(load_f32(sums + c * ROWS), rescale));
    float* scores = block.scores + p * LANES;
    for (int64_t i = 0; i < count; ++i) {
      const f32 below = sub_f32(load_f32(scores + i * ROWS), largest[p]);
      const f32 share = select_less(below, lowest, zero, exponential(below));
      store_f32(scores + i * ROWS, share);
      total = add_f32(total, share);
    }
    softmax.sum[p] = total;
  }
}

// Adds values of `count` keys from `key` on to N columns of the sums.
template <int N>
TERNC_NOINLINE void add_values(const QueryBlock& block, int64_t key, int64_t count,
                               int64_t column) {
  const int64_t columns = block.args->value_columns;
  float* sums = block.sums + column * ROWS;
  f32 sum[N][QUERY_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < QUERY_VECTORS; ++p) sum[i][p] = load_f32(sums + i * ROWS + p * LANES);
  add_products<N>(sum, block.values + key * columns + column, 1, columns, block.scores, count);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < QUERY_VECTORS; ++p) store_f32(sums + i * ROWS + p * LANES, sum[i][p]);
}

// All keys that the block sees, a span at a time.
inline Softmax attend(const QueryBlock& block) {
  const AttentionArgs& args = *block.args;
  const int64_t seen =
      args.causal && block.first + ROWS < args.keys ? block.first + ROWS : args.keys;
  Softmax softmax;
  for (int p = 0; p < QUERY_VECTORS; ++p) {
    softmax.largest[p] = splat_f32(-0x1.fffffep127f);
    softmax.sum[p] = splat_f32(0.0f);
  }
  for (int64_t key = 0; key < seen; key += ATTENTION_SPAN) {
    const int64_t count = seen - key < ATTENTION_SPAN ? seen - key : ATTENTION_SPAN;
    f32 largest[QUERY_VECTORS];
    for (int p = 0; p < QUERY_VECTORS; ++p) largest[p] = softmax.largest[p];
    int64_t i = 0;
    for (; i + TILE <= count; i += TILE)
      score_keys<TILE>(block, key + i, block.scores + i * ROWS, largest);
    for (; i < count; ++i) score_keys<1>(block, key + i, block.scores + i * ROWS, largest);
    exponentiate(block, count, largest, softmax);
    int64_t c = 0;
    for (; c + TILE <= args.value_columns; c += TILE) add_values<TILE>(block, key, count, c);
    for (; c < args.value_columns; ++c) add_values<1>(block, key, count, c);
  }
  return softmax;
}

// Query blocks [begin, end) of all heads. Of a head they come from both ends in turn: under a
// causal mask any two neighbours cost the same.
inline void attention(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t blocks = ceil_div(args.queries, ROWS);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, turn = item % blocks;
    const int64_t first = (turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2) * ROWS;
    const int64_t batch = head / args.heads, within = head % args.heads;
    const int64_t key_head = batch * args.key_heads + within / (args.heads / args.key_heads);
    const int64_t left = args.queries - first, count = left < ROWS ? left : ROWS;
    QueryBlock block = {&args,
                        args.k + key_head * args.keys * args.columns,
                        args.v + key_head * args.keys * args.value_columns,
                        first,
                        scratch,
                        scratch + args.columns * ROWS,
                        scratch + (args.columns + ATTENTION_SPAN) * ROWS};
    const float* q = args.q + (head * args.queries + first) * args.columns;
    for (int64_t c = 0; c < args.columns; ++c)
      for (int64_t i = 0; i < ROWS; ++i)
        block.queries[c * ROWS + i] = i < count ? q[i * args.columns + c] * args.scale : 0.0f;
    for (int64_t i = 0; i < args.value_columns * ROWS; ++i) block.sums[i] = 0.0f;
    const Softmax softmax = attend(block);
    float share[ROWS];  // 0 where every score is minus infinity
    for (int p = 0; p < QUERY_VECTORS; ++p) {
      const f32 sum = softmax.sum[p], part = div_f32(splat_f32(1.0f), sum);
      store_f32(share + p * LANES, select_less(splat_f32(0.0f), sum, part, sum));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (batch * args.queries + first + i) * args.heads + within;
      float* y = args.y + row * args.value_columns;
      for (int64_t c = 0; c < args.value_columns; ++c) y[c] = block.sums[c * ROWS + i] * share[i];
    }
  }
}
