// q, k, v, mask -> softmax(q k^T * scale) v in fp32 for few queries, such as those of one token.
//
// Columns lie in lanes. Two queries that share their keys go together, so that a key is read once;
// keys in front of the first and behind the last that a mask shows are not read.
//
//   keys [S][D] --queries of a pair--> scores [2][S] --softmax, values [S][Dv]--> y
#pragma once

#include "attention.h"

constexpr int VALUE_VECTORS = 4;  // columns of values in registers

// P queries of one key head.
template <int P>
struct QueryRows {
  const AttentionArgs* args;
  const float *keys, *values;  // of the head
  const float* queries[P];
  const uint8_t* masks[P];  // null: all keys are shown
  int64_t seen[P];          // keys in front of the last that the causal mask shows
  float* scores[P];
  float* y[P];
};

template <int P>
TERNC_INLINE bool shows(const QueryRows<P>& rows, int p, int64_t key) {
  return key < rows.seen[p] &&
         (rows.masks[p] == nullptr || rows.masks[p][key * rows.args->mask_key]);
}

template <int P>
TERNC_INLINE bool any_shows(const QueryRows<P>& rows, int64_t key) {
  bool shown = false;
  for (int p = 0; p < P; ++p) shown |= shows(rows, p, key);
  return shown;
}

// Scores of N keys from `key` on with the queries; hidden ones are minus infinity.
template <int P, int N>
TERNC_NOINLINE void score_rows(const QueryRows<P>& rows, int64_t key) {
  const int64_t columns = rows.args->columns;
  const float* keys = rows.keys + key * columns;
  f32 sum[N][P];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    for (int p = 0; p < P; ++p) sum[i][p] = splat_f32(0.0f);
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    f32 query[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) query[p] = load_f32(rows.queries[p] + c);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32 values = load_f32(keys + i * columns + c);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[i][p] = fma_f32(values, query[p], sum[i][p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      float score = sum_lanes(sum[i][p]);
      for (int64_t j = c; j < columns; ++j) score += keys[i * columns + j] * rows.queries[p][j];
      rows.scores[p][key + i] =
          shows(rows, p, key + i) ? score * rows.args->scale : -__builtin_inff();
    }
}

// Scores of keys [first, last) -> their exponentials; 1 / their sum, or 0 where none is shown.
// Behind the last there is room for a vector.
inline float softmax_row(float* scores, int64_t first, int64_t last) {
  for (int i = 0; i < LANES; ++i) scores[last + i] = -__builtin_inff();
  const f32 lowest = splat_f32(-86.0f), zero = splat_f32(0.0f);
  f32 largest = splat_f32(-0x1.fffffep127f);  // finite: scores of minus infinity count as nothing
  for (int64_t i = first; i < last; i += LANES) largest = max_f32(load_f32(scores + i), largest);
  float lanes[LANES], most = -0x1.fffffep127f;
  store_f32(lanes, largest);
  for (const float lane : lanes) most = lane > most ? lane : most;
  f32 total = zero;
  for (int64_t i = first; i < last; i += LANES) {
    const f32 below = sub_f32(load_f32(scores + i), splat_f32(most));
    const f32 share = select_less(below, lowest, zero, exponential(below));
    store_f32(scores + i, share);
    total = add_f32(total, share);
  }
  const float sum = sum_lanes(total);
  return sum > 0.0f ? 1.0f / sum : sum;
}

// Sums of V vectors of columns of the values, weighed by the scores of keys [first, last).
template <int P, int V>
TERNC_NOINLINE void weigh_values(const QueryRows<P>& rows, int64_t first, int64_t last,
                                 int64_t column, const float (&share)[P]) {
  const int64_t columns = rows.args->value_columns;
  f32 sum[V][P];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    for (int p = 0; p < P; ++p) sum[v][p] = splat_f32(0.0f);
  for (int64_t key = first; key < last; ++key) {
    const float* values = rows.values + key * columns + column;
    bool counts = false;
    for (int p = 0; p < P; ++p) counts |= rows.scores[p][key] != 0.0f;
    if (!counts) continue;
    f32 factor[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) factor[p] = splat_f32(rows.scores[p][key]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const f32 value = load_f32(values + v * LANES);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[v][p] = fma_f32(factor[p], value, sum[v][p]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    for (int p = 0; p < P; ++p)
      store_f32(rows.y[p] + column + v * LANES, mul_f32(sum[v][p], splat_f32(share[p])));
}

// The columns behind the last whole vector.
template <int P>
void weigh_rest(const QueryRows<P>& rows, int64_t first, int64_t last, int64_t column,
                const float (&share)[P]) {
  const int64_t columns = rows.args->value_columns;
  for (int p = 0; p < P; ++p)
    for (int64_t c = column; c < columns; ++c) {
      float sum = 0.0f;
      for (int64_t key = first; key < last; ++key)
        if (const float score = rows.scores[p][key]; score != 0.0f)
          sum += score * rows.values[key * columns + c];
      rows.y[p][c] = sum * share[p];
    }
}

template <int P>
void attend_rows(const QueryRows<P>& rows) {
  int64_t first = 0, last = rows.args->keys;
  while (last > 0 && !any_shows(rows, last - 1)) --last;
  while (first < last && !any_shows(rows, first)) ++first;
  int64_t key = first;
  for (; key + TILE <= last; key += TILE) score_rows<P, TILE>(rows, key);
  for (; key < last; ++key) score_rows<P, 1>(rows, key);
  float share[P];
  for (int p = 0; p < P; ++p) share[p] = softmax_row(rows.scores[p], first, last);
  const int64_t columns = rows.args->value_columns;
  int64_t c = 0;
  for (; c + VALUE_VECTORS * LANES <= columns; c += VALUE_VECTORS * LANES)
    weigh_values<P, VALUE_VECTORS>(rows, first, last, c, share);
  for (; c + LANES <= columns; c += LANES) weigh_values<P, 1>(rows, first, last, c, share);
  weigh_rest(rows, first, last, c, share);
}

// Queries `row` and following of one batch and key head: head by head, query by query.
template <int P>
void attend_rows_at(const AttentionArgs& args, int64_t batch, int64_t group, int64_t row,
                    float* scratch) {
  const int64_t shared = args.heads / args.key_heads, key_head = batch * args.key_heads + group;
  QueryRows<P> rows;
  rows.args = &args;
  rows.keys = args.k + key_head * args.keys * args.columns;
  rows.values = args.v + key_head * args.keys * args.value_columns;
  for (int p = 0; p < P; ++p) {
    const int64_t head = group * shared + (row + p) / args.queries;
    const int64_t query = (row + p) % args.queries;
    rows.queries[p] = args.q + ((batch * args.heads + head) * args.queries + query) * args.columns;
    rows.masks[p] = args.mask == nullptr ? nullptr
                                         : args.mask + batch * args.mask_batch +
                                               head * args.mask_head + query * args.mask_query;
    rows.seen[p] = args.causal && query + 1 < args.keys ? query + 1 : args.keys;
    rows.scores[p] = scratch + p * attention_row_floats(args.keys) / QUERY_PAIR;
    rows.y[p] = args.y + ((batch * args.queries + query) * args.heads + head) * args.value_columns;
  }
  attend_rows(rows);
}

// Pairs [begin, end) of queries, ceil(H / G * L / 2) of each of B * G key heads.
inline void attention_rows(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t count = args.heads / args.key_heads * args.queries;
  const int64_t pairs = ceil_div(count, QUERY_PAIR);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t key_head = item / pairs, row = item % pairs * QUERY_PAIR;
    const int64_t batch = key_head / args.key_heads, group = key_head % args.key_heads;
    if (row + 1 < count)
      attend_rows_at<QUERY_PAIR>(args, batch, group, row, scratch);
    else
      attend_rows_at<1>(args, batch, group, row, scratch);
  }
}
