// x fp32, packed weight -> y: floating-point activations, fp32 sums of x * c, FMA.
//
// Codes are decoded to fp32 lanes once for up to four tokens; a carried field's sum is scaled by
// 2^-carry, which is exact. Sums restart every group or 128 columns, so that rounding errors grow
// with the length of a piece, not of a row: twice those of F.linear with 512.
#pragma once

#include "linear.h"

constexpr int64_t SUMMED_COLUMNS = 128;

struct SpanF32 {
  const LinearF32Args* args;
  const Ahead* ahead;
  const uint8_t* steps;
  const float* x;             // first column of the span, first token
  const uint8_t* multiplier;  // of this block and group, or null
  int64_t block, group, count;
};

// Independent sums of each row, one for every SETS-th column of a step.
constexpr int column_sets(int planes, int tokens) { return tile_sets(planes, tokens); }

template <int T, int J, int SETS>
TERNC_INLINE void add_columns(f32 (&acc)[T][SETS], bytes codes, const float* x, int64_t stride) {
  if constexpr (J < STEP_COLUMNS) {
    const f32 weight = byte_f32<J>(codes);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      acc[t][J % SETS] = fma_f32(weight, splat_f32(x[t * stride + J]), acc[t][J % SETS]);
    add_columns<T, J + 1, SETS>(acc, codes, x, stride);
  }
}

template <int PLANES, int T, int F0, int FN, int PN, int SETS, int F = 0>
TERNC_INLINE void add_step_f32(f32 (&acc)[FN][PN][T][SETS], const uint8_t* step, const float* x,
                               int64_t stride, int part) {
  if constexpr (F < FN) {
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p)
      add_columns<T, 0, SETS>(acc[F][p], decode_signed<PLANES, F0 + F>(step, part + p), x, stride);
    add_step_f32<PLANES, T, F0, FN, PN, SETS, F + 1>(acc, step, x, stride, part);
  }
}

template <int PLANES, int T, int F0, int FN, int PN, int SETS, int F = 0>
TERNC_INLINE void retire_f32(const f32 (&acc)[FN][PN][T][SETS], const SpanF32& span, int part,
                             float (&totals)[TOKENS][MAX_BLOCK_ROWS]) {
  if constexpr (F < FN) {
    const Weight& weight = span.args->weight;
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p) {
      const int row = (F0 + F) * FIELD_ROWS + (part + p) * LANES;
      f32 factor = splat_f32(carry_inverse(PLANES, F0 + F));
      if (span.multiplier != nullptr)
        factor = mul_f32(factor, to_f32(load_u8_i32(span.multiplier + row)));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        f32 sum = acc[F][p][t][0];
#pragma GCC unroll 4
        for (int set = 1; set < SETS; ++set) sum = add_f32(sum, acc[F][p][t][set]);
        float* total = totals[t] + row;
        if (weight.scale_kind == ScaleKind::group) {
          float values[LANES];
          store_f32(values, mul_f32(sum, factor));
          add_free(values, weight, span.block * block_rows(PLANES) + row, span.group, total);
        } else {
          store_f32(total, fma_f32(sum, factor, load_f32(total)));
        }
      }
    }
    retire_f32<PLANES, T, F0, FN, PN, SETS, F + 1>(acc, span, part, totals);
  }
}

template <int PLANES, int T, int F0>
TERNC_TILE void tile_f32(const SpanF32& span, int part, float (&totals)[TOKENS][MAX_BLOCK_ROWS]) {
  constexpr int FN = fields_from(PLANES, T, F0), PN = tile_parts(T), SETS = column_sets(PLANES, T);
  const int64_t stride = span.args->stride;
  f32 acc[FN][PN][T][SETS];
#pragma GCC unroll 64
  for (int i = 0; i < FN * PN * T * SETS; ++i)
    acc[i / (PN * T * SETS)][i / (T * SETS) % PN][i / SETS % T][i % SETS] = splat_f32(0.0f);
  [[maybe_unused]] const Ahead ahead = *span.ahead;
  const uint8_t* step = span.steps;
  const float* x = span.x;
  for (int64_t s = 0; s < span.count; ++s) {
    if constexpr (PLANES != EXPANDED) {
      prefetch_window<PLANES>(step, s, ahead);
      prefetch_step<PLANES>(step);
    }
    add_step_f32<PLANES, T, F0, FN, PN, SETS>(acc, step, x, stride, part);
    step += step_bytes(PLANES);
    x += STEP_COLUMNS;
  }
  retire_f32<PLANES, T, F0, FN, PN, SETS>(acc, span, part, totals);
}

template <int PLANES, int T, int F0 = 0>
inline void all_tiles_f32(const SpanF32& span, float (&totals)[TOKENS][MAX_BLOCK_ROWS]) {
  if constexpr (F0 < fields(PLANES)) {
    for (int part = 0; part < PARTS; part += tile_parts(T))
      tile_f32<PLANES, T, F0>(span, part, totals);
    all_tiles_f32<PLANES, T, F0 + tile_fields(PLANES, T)>(span, totals);
  }
}

// T tokens from `token` on x one block.
template <int PLANES, int T>
inline void block_f32(const LinearF32Args& args, const Ahead& ahead, int64_t block, int64_t token,
                      const RowFactors& factors) {
  const Weight& weight = args.weight;
  const int64_t steps = args.stride / STEP_COLUMNS;
  alignas(64) float totals[TOKENS][MAX_BLOCK_ROWS];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < block_rows(PLANES); ++r) totals[t][r] = 0.0f;
  alignas(64) uint8_t expanded[PLANES == EXPANDED ? EXPANDED_BYTES : 1];
  SpanF32 span;
  span.args = &args;
  span.ahead = &ahead;
  span.block = block;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t begin = group * weight.group_size;
    const int64_t end = group + 1 == weight.groups ? args.stride : begin + weight.group_size;
    span.group = group;
    span.multiplier =
        weight.multiplier == nullptr
            ? nullptr
            : weight.multiplier + (block * weight.groups + group) * block_rows(PLANES);
    for (int64_t k = begin; k < end; k += SUMMED_COLUMNS) {
      span.count = (end - k < SUMMED_COLUMNS ? end - k : SUMMED_COLUMNS) / STEP_COLUMNS;
      span.steps = weight.bytes + (block * steps + k / STEP_COLUMNS) * stored_bytes(PLANES);
      if constexpr (PLANES == EXPANDED) {
        expand(span.steps, span.count, expanded, ahead);
        span.steps = expanded;
      }
      span.x = args.x + token * args.stride + k;
      all_tiles_f32<PLANES, T>(span, totals);
    }
  }
  for (int t = 0; t < T; ++t) store_outputs(totals[t], 1.0f, factors, weight, args.out, token + t);
}

template <int PLANES>
inline void linear_f32(const LinearF32Args& args, const Range& range) {
  const Ahead ahead = ahead_of(args.weight, stored_bytes(PLANES), args.prefetch, range);
  RowFactors factors;
  for (int64_t block = range.block_begin; block < range.block_end; ++block) {
    load_factors(args.weight, args.out, block_rows(PLANES), block, factors);
    int64_t token = range.token_begin;
    for (; token + TOKENS <= range.token_end; token += TOKENS)
      block_f32<PLANES, TOKENS>(args, ahead, block, token, factors);
    const int64_t left = range.token_end - token;
    if (left == 3) block_f32<PLANES, 3>(args, ahead, block, token, factors);
    if (left == 2) block_f32<PLANES, 2>(args, ahead, block, token, factors);
    if (left == 1) block_f32<PLANES, 1>(args, ahead, block, token, factors);
  }
}
