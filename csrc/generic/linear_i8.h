// q int8, packed weight -> y: exact int32 sums of q * m * c.
//
// A tile adds unsigned fields (code + bias) * 2^carry. Its sums start at -bias * sum(q) * 2^carry,
// so that they end at sum(q * c) * 2^carry, which fits int32 for every K up to MAX_COLUMNS (64 *
// 127
// * 131072 < 2^31; what wraps on the way wraps back).
//
// INT8 weights are signed bytes: dot_signed() multiplies them, and its own bias is INT8_BIAS.
#pragma once

#include "linear.h"

constexpr int64_t NO_LIMIT = MAX_COLUMNS;

// Totals of one block for up to WIDE_TOKENS tokens: integers (tied scales) or fp32 (free scales).
struct TotalsI8 {
  alignas(64) int32_t tied[WIDE_TOKENS][MAX_BLOCK_ROWS];
  alignas(64) float free[WIDE_TOKENS][MAX_BLOCK_ROWS];
};

struct SpanI8 {
  const LinearI8Args* args;
  const uint8_t* steps;         // first step of the span in this block
  const int8_t* q;              // first column of the span, first token
  const uint8_t* multiplier;    // of this block and group, or null
  int64_t block, group, count;  // count: steps
  int32_t sum[WIDE_TOKENS];     // of q over the columns that this span corrects for
};

template <int PLANES, int T, int F0, int FN, int PN, int F = 0>
TERNC_INLINE void add_step(i32 (&acc)[FN][PN][T], const uint8_t* step, const bytes (&q)[T],
                           int part) {
  if constexpr (F < FN) {
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p) {
      const bytes field = decode<PLANES, F0 + F>(step, part + p);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        if constexpr (PLANES == INT8)
          acc[F][p][t] = dot_signed(acc[F][p][t], field, q[t]);
        else
          acc[F][p][t] = dot(acc[F][p][t], field, q[t]);
      }
    }
    add_step<PLANES, T, F0, FN, PN, F + 1>(acc, step, q, part);
  }
}

template <int PLANES, int T, int F0, int FN, int PN, int F = 0>
TERNC_INLINE void start_sums(i32 (&acc)[FN][PN][T], const SpanI8& span) {
  if constexpr (F < FN) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      constexpr int BIAS = PLANES == INT8 ? INT8_BIAS : bias(PLANES);
      const i32 start = shift_i32_left<carry(PLANES, F0 + F)>(splat_i32(-BIAS * span.sum[t]));
#pragma GCC unroll 16
      for (int p = 0; p < PN; ++p) acc[F][p][t] = start;
    }
    start_sums<PLANES, T, F0, FN, PN, F + 1>(acc, span);
  }
}

// Adds a tile's sums, times the group's multiplier or free scale, to the totals of the block.
template <int PLANES, int T, int F0, int FN, int PN, int F = 0>
TERNC_INLINE void retire(const i32 (&acc)[FN][PN][T], const SpanI8& span, int part,
                         TotalsI8& totals) {
  if constexpr (F < FN) {
    const Weight& weight = span.args->weight;
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p) {
      const int row = (F0 + F) * FIELD_ROWS + (part + p) * LANES;
      i32 factor = splat_i32(1);
      if (span.multiplier != nullptr) factor = load_u8_i32(span.multiplier + row);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        i32 sum = shift_i32_right<carry(PLANES, F0 + F)>(acc[F][p][t]);
        if (weight.scale_kind == ScaleKind::group) {
          float values[LANES];
          store_f32(values, to_f32(sum));
          add_free(values, weight, span.block * block_rows(PLANES) + row, span.group,
                   totals.free[t] + row);
        } else {
          if (span.multiplier != nullptr) sum = mul_i32(sum, factor);
          int32_t* total = totals.tied[t] + row;
          store_i32(total, add_i32(load_i32(total), sum));
        }
      }
    }
    retire<PLANES, T, F0, FN, PN, F + 1>(acc, span, part, totals);
  }
}

template <int T>
TERNC_INLINE void load_q(bytes (&q)[T], const int8_t* at, int64_t stride) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) q[t] = splat_word(at + t * stride);
}

// One span x fields [F0, F0 + FN) x parts [part, part + PN) x T tokens.
template <int PLANES, int T, int F0>
TERNC_TILE void tile_i8(const SpanI8& span, int part, TotalsI8& totals) {
  constexpr int FN = fields_from(PLANES, T, F0), PN = tile_parts(T), SETS = tile_sets(PLANES, T);
  const int64_t stride = span.args->tokens.stride;
  [[maybe_unused]] const Prefetch prefetch = span.args->prefetch;
  const uint8_t* step = span.steps;
  const int8_t* at = span.q;
  i32 acc[SETS][FN][PN][T];
  bytes q[T];
  start_sums<PLANES, T, F0, FN, PN>(acc[0], span);
  if constexpr (SETS > 1) {
#pragma GCC unroll 8
    for (int set = 1; set < SETS; ++set)
#pragma GCC unroll 16
      for (int i = 0; i < FN * PN * T; ++i)
        acc[set][i / (PN * T)][i / T % PN][i % T] = splat_i32(0);
  }
  int64_t s = 0;
  for (; s + SETS <= span.count; s += SETS) {
#pragma GCC unroll 8
    for (int set = 0; set < SETS; ++set) {
      if constexpr (PLANES != EXPANDED) prefetch_step<PLANES>(step, prefetch);
      load_q<T>(q, at, stride);
      add_step<PLANES, T, F0, FN, PN>(acc[set], step, q, part);
      step += step_bytes(PLANES);
      at += STEP_COLUMNS;
    }
  }
  if constexpr (SETS > 1) {
    for (; s < span.count; ++s, step += step_bytes(PLANES), at += STEP_COLUMNS) {
      load_q<T>(q, at, stride);
      add_step<PLANES, T, F0, FN, PN>(acc[0], step, q, part);
    }
#pragma GCC unroll 8
    for (int set = 1; set < SETS; ++set)
#pragma GCC unroll 16
      for (int i = 0; i < FN * PN * T; ++i) {
        i32& sum = acc[0][i / (PN * T)][i / T % PN][i % T];
        sum = add_i32(sum, acc[set][i / (PN * T)][i / T % PN][i % T]);
      }
  }
  retire<PLANES, T, F0, FN, PN>(acc[0], span, part, totals);
}

template <int PLANES, int T, int F0 = 0>
inline void all_tiles_i8(const SpanI8& span, TotalsI8& totals) {
  if constexpr (F0 < fields(PLANES)) {
    for (int part = 0; part < PARTS; part += tile_parts(T))
      tile_i8<PLANES, T, F0>(span, part, totals);
    all_tiles_i8<PLANES, T, F0 + tile_fields(PLANES, T)>(span, totals);
  }
}

// T tokens from `token` on x one block.
template <int PLANES, int T>
inline void block_i8(const LinearI8Args& args, int64_t block, int64_t token,
                     const RowFactors& factors) {
  const Weight& weight = args.weight;
  const Tokens& tokens = args.tokens;
  const int64_t steps = tokens.stride / STEP_COLUMNS;
  TotalsI8 totals;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < block_rows(PLANES); ++r) totals.tied[t][r] = 0, totals.free[t][r] = 0.0f;
  SpanI8 span;
  span.args = &args;
  span.block = block;
  constexpr bool EXPANDS = PLANES == EXPANDED;
  constexpr int64_t LIMIT = single_pass(PLANES, T) && !EXPANDS ? NO_LIMIT : PIECE_COLUMNS;
  alignas(64) uint8_t expanded[EXPANDS ? EXPANDED_BYTES : 1];
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t begin = group * weight.group_size;
    const int64_t end = group + 1 == weight.groups ? tokens.stride : begin + weight.group_size;
    span.group = group;
    span.multiplier =
        weight.multiplier == nullptr
            ? nullptr
            : weight.multiplier + (block * weight.groups + group) * block_rows(PLANES);
    if (span.multiplier != nullptr) prefetch_multiplier(span.multiplier, block_rows(PLANES));
    // Free scales, which want a group's sum whole, do not come with DENSE.
    const bool whole = end - begin <= LIMIT || (!EXPANDS && weight.scale_kind == ScaleKind::group);
    for (int64_t k = begin; k < end; k += whole ? end - begin : LIMIT) {
      const int64_t columns = whole || end - k < LIMIT ? end - k : LIMIT;
      span.count = columns / STEP_COLUMNS;
      span.steps = weight.bytes + (block * steps + k / STEP_COLUMNS) * stored_bytes(PLANES);
      if constexpr (EXPANDS) {
        expand(span.steps, span.count, expanded, args.prefetch);
        span.steps = expanded;
      }
      span.q = tokens.q + token * tokens.stride + k;
      for (int t = 0; t < T; ++t)
        // Of several pieces the first corrects for the whole group.
        span.sum[t] = k == begin ? tokens.sums[(token + t) * weight.groups + group] : 0;
      all_tiles_i8<PLANES, T>(span, totals);
    }
  }
  for (int t = 0; t < T; ++t) {
    if (weight.scale_kind != ScaleKind::group)
      for (int r = 0; r < block_rows(PLANES); ++r) totals.free[t][r] = float(totals.tied[t][r]);
    store_outputs(totals.free[t], tokens.scale[token + t], factors, weight, args.out, token + t);
  }
}

template <int PLANES>
inline void linear_i8(const LinearI8Args& args, const Range& range) {
  RowFactors factors;
  for (int64_t block = range.block_begin; block < range.block_end; ++block) {
    load_factors(args.weight, args.out, block_rows(PLANES), block, factors);
    int64_t token = range.token_begin;
    constexpr int WIDE = PLANES == DENSE ? TOKENS : WIDE_TOKENS;
    for (; token + WIDE <= range.token_end; token += WIDE)
      block_i8<PLANES, WIDE>(args, block, token, factors);
    for (; token + TOKENS <= range.token_end; token += TOKENS)
      block_i8<PLANES, TOKENS>(args, block, token, factors);
    const int64_t left = range.token_end - token;
    if (left == 3) block_i8<PLANES, 3>(args, block, token, factors);
    if (left == 2) block_i8<PLANES, 2>(args, block, token, factors);
    if (left == 1) block_i8<PLANES, 1>(args, block, token, factors);
  }
}
