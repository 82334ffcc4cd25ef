// q int8, packed weight -> y: exact int32 sums of q * m * c.
//
// A tile adds unsigned fields (code + bias) * 2^carry. The sums of a group end at
// (sum(q * c) + bias * sum(q)) * 2^carry, which fits int32 for every K up to MAX_COLUMNS (128 * 127
// * 131072 < 2^31); the shift is exact, and bias * sum(q) is subtracted then. A tile walks over all
// groups of its span, so that they cost a few instructions each and no call.
//
// The last field of a byte need not be masked: its sum is that of whole bytes less those of the
// other fields (which may wrap on the way, and wraps back).
//
// INT8 weights are signed bytes: dot_signed() multiplies them, and its own bias is INT8_BIAS
// (their sums may wrap on the way, and wrap back: they carry nothing).
#pragma once

#include "linear.h"

constexpr int64_t NO_LIMIT = MAX_COLUMNS;

// Totals of one block for up to WIDE_TOKENS tokens: integers (tied scales), and all as fp32.
struct TotalsI8 {
  alignas(64) int32_t tied[WIDE_TOKENS][MAX_BLOCK_ROWS];
  alignas(64) float free[WIDE_TOKENS][MAX_BLOCK_ROWS];
};

// What the sum of a group becomes in the totals: itself, times its multiplier, or times its free
// scale in fp32.
enum class Groups { none, multiplied, free };

// Of a group, in whole steps.
inline int64_t group_columns(const Weight& weight) {
  return ceil_div(weight.group_size, STEP_COLUMNS) * STEP_COLUMNS;
}

// Columns [begin, end) of the blocks of one tile: whole groups, or a piece of one.
struct SpanI8 {
  const LinearI8Args* args;
  const Ahead* ahead;
  const uint8_t* steps;  // that of column `begin` in the first block
  int64_t block, apart;  // the first block, and blocks from one to the next
  int64_t token, begin, end;
};

// The tile has all fields of a byte, each where it lies, and dot() takes whole bytes. One token of
// one plane in L2 takes 12 % less time on a Xeon, where masks and products share two ports. With
// four tokens a mask is one instruction in five, and the subtractions of a group cost 4 % on Zen 5.
template <int PLANES, int T, int F0, int FN>
constexpr bool sums_whole_bytes() {
  if (T > 2 || PLANES > 2 || F0 != 0 || FN != fields(PLANES) || MAX_FIELD < 255) return false;
  return carry(PLANES, FN - 1) == field_bit(PLANES, FN - 1);
}

template <int PLANES, int T, int F0, int FN, int PN, int F = 0>
TERNC_INLINE void add_step(i32 (&acc)[FN][PN][T], const uint8_t* step, const bytes (&q)[T],
                           int part) {
  if constexpr (F < FN) {
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p) {
      constexpr bool WHOLE = sums_whole_bytes<PLANES, T, F0, FN>() && F == FN - 1;
      const bytes field = WHOLE ? load_bytes(step + (part + p) * PART_BYTES)
                                : decode<PLANES, F0 + F>(step, part + p);
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

// Adds the sums of one group, less their bias, to the totals of the block.
template <int PLANES, int T, int F0, int FN, int PN, Groups G, int F = 0>
TERNC_INLINE void retire(const i32 (&acc)[FN][PN][T], const i32 (&biases)[T], const Weight& weight,
                         int64_t block, int64_t group, int part, TotalsI8& totals) {
  if constexpr (F < FN) {
    constexpr int ROWS = block_rows(PLANES);
#pragma GCC unroll 16
    for (int p = 0; p < PN; ++p) {
      const int row = (F0 + F) * FIELD_ROWS + (part + p) * LANES;
      i32 factor;
      if constexpr (G == Groups::multiplied)
        factor = load_u8_i32(weight.multiplier + (block * weight.groups + group) * ROWS + row);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        i32 sum = sub_i32(shift_i32_right<carry(PLANES, F0 + F)>(acc[F][p][t]), biases[t]);
        if constexpr (G == Groups::free) {
          float values[LANES];
          store_f32(values, to_f32(sum));
          add_free(values, weight, block * ROWS + row, group, totals.free[t] + row);
        } else {
          if constexpr (G == Groups::multiplied) sum = mul_i32(sum, factor);
          int32_t* total = totals.tied[t] + row;
          store_i32(total, add_i32(load_i32(total), sum));
        }
      }
    }
    retire<PLANES, T, F0, FN, PN, G, F + 1>(acc, biases, weight, block, group, part, totals);
  }
}

template <int T>
TERNC_INLINE void load_q(bytes (&q)[T], const int8_t* at, int64_t stride) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) q[t] = splat_word(at + t * stride);
}

// Where a tile stands in its walk: in its first block, and bytes from one block to the next.
struct CursorI8 {
  const uint8_t* step;
  const int8_t* q;
  int64_t apart;
};

template <int PLANES, int T, int F0, int FN, int PN, int B>
TERNC_INLINE void add_steps(i32 (&acc)[B][FN][PN][T], CursorI8& at, int64_t stride, int part) {
  bytes q[T];
  load_q<T>(q, at.q, stride);
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b)
    add_step<PLANES, T, F0, FN, PN>(acc[b], at.step + b * at.apart, q, part);
  at.step += step_bytes(PLANES);
  at.q += STEP_COLUMNS;
}

// `count` steps x B blocks x fields [F0, F0 + FN) x parts [part, part + PN) x T tokens: 20 sums at
// most, which a loop over them that is not unrolled would put in memory.
template <int PLANES, int T, int F0, int FN, int PN, int B>
TERNC_INLINE void sum_steps(i32 (&sum)[B][FN][PN][T], CursorI8& at, int64_t count, int64_t stride,
                            int part, const Ahead& ahead) {
  constexpr int SETS = tile_sets(PLANES, T, B), BLOCK = FN * PN * T;
  i32 acc[SETS][B][FN][PN][T];
#pragma GCC unroll 8
  for (int set = 0; set < SETS; ++set)
#pragma GCC unroll 32
    for (int i = 0; i < B * BLOCK; ++i)
      acc[set][i / BLOCK][i % BLOCK / (PN * T)][i / T % PN][i % T] = splat_i32(0);
  [[maybe_unused]] const int64_t near =
      T > 1 && B == 1 && ahead.to == Prefetch::l1 ? L1_FURTHER_AHEAD : L1_AHEAD;
  int64_t s = 0;
  for (; s + SETS <= count; s += SETS) {
    if constexpr (PLANES != EXPANDED) prefetch_window<PLANES>(at.step, s, ahead);
#pragma GCC unroll 8
    for (int set = 0; set < SETS; ++set) {
      if constexpr (PLANES != EXPANDED)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) prefetch_step<PLANES>(at.step + b * at.apart, near);
      add_steps<PLANES, T, F0, FN, PN, B>(acc[set], at, stride, part);
    }
  }
  if constexpr (SETS > 1)
    for (; s < count; ++s) add_steps<PLANES, T, F0, FN, PN, B>(acc[0], at, stride, part);
#pragma GCC unroll 32
  for (int i = 0; i < B * BLOCK; ++i) {
    const int b = i / BLOCK, f = i % BLOCK / (PN * T), p = i / T % PN, t = i % T;
    i32 whole = acc[0][b][f][p][t];
#pragma GCC unroll 8
    for (int set = 1; set < SETS; ++set) whole = add_i32(whole, acc[set][b][f][p][t]);
    if constexpr (sums_whole_bytes<PLANES, T, F0, FN>())
      if (f == FN - 1)
#pragma GCC unroll 4
        for (int other = 0; other < FN - 1; ++other) whole = sub_i32(whole, sum[b][other][p][t]);
    sum[b][f][p][t] = whole;
  }
}

// One span x B blocks x fields from F0 on x parts from `part` on x T tokens.
template <int PLANES, int T, int F0, Groups G, int B>
TERNC_TILE void tile_i8(const SpanI8& span, int part, TotalsI8* totals) {
  constexpr int FN = fields_from(PLANES, T, F0), PN = tile_parts(T);
  constexpr int BIAS = PLANES == INT8 ? INT8_BIAS : bias(PLANES);
  const Weight& weight = span.args->weight;
  const Tokens& tokens = span.args->tokens;
  const int64_t size = group_columns(weight), end = span.end;
  const int32_t* sums = tokens.sums + span.token * weight.groups;
  const int64_t steps = ceil_div(weight.columns, STEP_COLUMNS);
  CursorI8 at = {span.steps, tokens.q + span.token * tokens.stride + span.begin,
                 span.apart * steps * step_bytes(PLANES)};
  int64_t group = span.begin / size;
  for (int64_t k = span.begin; k < end; ++group) {
    const int64_t columns = end - k < size ? end - k : size;
    if constexpr (G == Groups::multiplied)
      for (int64_t b = 0, block = span.block; b < B; ++b, block += span.apart)
        prefetch_multiplier(
            weight.multiplier + (block * weight.groups + group) * block_rows(PLANES),
            block_rows(PLANES));
    i32 sum[B][FN][PN][T], biases[T];
    sum_steps<PLANES, T, F0, FN, PN, B>(sum, at, columns / STEP_COLUMNS, tokens.stride, part,
                                        *span.ahead);
    // Of several pieces the first corrects for the whole group.
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      biases[t] = splat_i32(k == group * size ? BIAS * sums[t * weight.groups + group] : 0);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b)
      retire<PLANES, T, F0, FN, PN, G>(sum[b], biases, weight, span.block + b * span.apart, group,
                                       part, totals[b]);
    k += columns;
  }
}

template <int PLANES, int T, Groups G, int B, int F0 = 0>
inline void all_tiles_i8(const SpanI8& span, TotalsI8* totals) {
  if constexpr (F0 < fields(PLANES)) {
    for (int part = 0; part < PARTS; part += tile_parts(T))
      tile_i8<PLANES, T, F0, G, B>(span, part, totals);
    all_tiles_i8<PLANES, T, G, B, F0 + tile_fields(PLANES, T)>(span, totals);
  }
}

// Columns of the span that begins at `begin`. Free scales want a group's sum whole (they do not
// come with DENSE).
template <int PLANES, int T, Groups G>
inline int64_t span_columns(const Weight& weight, int64_t begin) {
  constexpr int64_t LIMIT = single_pass(PLANES, T) && PLANES != EXPANDED ? NO_LIMIT : PIECE_COLUMNS;
  const int64_t size = group_columns(weight);
  if (size <= LIMIT) return LIMIT / size * size;
  if (G == Groups::free) return size;
  const int64_t left = size - begin % size;
  return left < LIMIT ? left : LIMIT;
}

// T tokens from `token` on x B blocks, `apart` from one to the next.
template <int PLANES, int T, Groups G, int B = 1>
inline void blocks_by_tokens(const LinearI8Args& args, const Ahead& ahead, int64_t block,
                             int64_t apart, int64_t token, const RowFactors* factors) {
  const Weight& weight = args.weight;
  const int64_t steps = ceil_div(weight.columns, STEP_COLUMNS), columns = steps * STEP_COLUMNS;
  TotalsI8 totals[B];
  for (int b = 0; b < B; ++b)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < block_rows(PLANES); r += LANES)
        if constexpr (G == Groups::free)
          store_f32(totals[b].free[t] + r, splat_f32(0.0f));
        else
          store_i32(totals[b].tied[t] + r, splat_i32(0));
  SpanI8 span = {&args, &ahead, nullptr, block, apart, token, 0, 0};
  constexpr bool EXPANDS = PLANES == EXPANDED;
  alignas(64) uint8_t expanded[EXPANDS ? EXPANDED_BYTES : 1];
  for (; span.begin < columns; span.begin = span.end) {
    const int64_t count = span_columns<PLANES, T, G>(weight, span.begin);
    span.end = count < columns - span.begin ? span.begin + count : columns;
    span.steps = weight.bytes + (block * steps + span.begin / STEP_COLUMNS) * stored_bytes(PLANES);
    if constexpr (EXPANDS) {
      expand(span.steps, (span.end - span.begin) / STEP_COLUMNS, expanded, ahead);
      span.steps = expanded;
    }
    all_tiles_i8<PLANES, T, G, B>(span, totals);
  }
  for (int b = 0; b < B; ++b)
    for (int t = 0; t < T; ++t) {
      TotalsI8& total = totals[b];
      if constexpr (G != Groups::free)
        for (int r = 0; r < block_rows(PLANES); r += LANES)
          store_f32(total.free[t] + r, to_f32(load_i32(total.tied[t] + r)));
      store_outputs(total.free[t], args.tokens.scale[token + t], factors[b], weight, args.out,
                    token + t);
    }
}

// T tokens, all of the range, x its blocks: several together, a part of the range apart, where
// nothing else fetches from several places.
template <int PLANES, int T, Groups G>
inline void few_tokens_i8(const LinearI8Args& args, const Ahead& ahead, const Range& range) {
  constexpr int B = tile_blocks(PLANES, T), ROWS = block_rows(PLANES);
  RowFactors factors[B];
  const int64_t count = range.block_end - range.block_begin;
  const int64_t apart = ahead.to == Prefetch::l1 ? count / B : 0;
  int64_t block = range.block_begin;
  for (; block < range.block_begin + apart; ++block) {
    for (int b = 0; b < B; ++b)
      load_factors(args.weight, args.out, ROWS, block + b * apart, factors[b]);
    blocks_by_tokens<PLANES, T, G, B>(args, ahead, block, apart, range.token_begin, factors);
  }
  for (block += (B - 1) * apart; block < range.block_end; ++block) {
    load_factors(args.weight, args.out, ROWS, block, factors[0]);
    blocks_by_tokens<PLANES, T, G>(args, ahead, block, 0, range.token_begin, factors);
  }
}

template <int PLANES, Groups G>
inline void blocks_i8(const LinearI8Args& args, const Range& range) {
  constexpr int WIDE = PLANES == DENSE ? TOKENS : WIDE_TOKENS;
  const Ahead ahead = ahead_of(args.weight, stored_bytes(PLANES), args.prefetch, range);
  const int64_t tokens = range.token_end - range.token_begin;
  if (tokens == 1) return few_tokens_i8<PLANES, 1, G>(args, ahead, range);
  if (tokens == 2) return few_tokens_i8<PLANES, 2, G>(args, ahead, range);
  RowFactors factors;
  for (int64_t block = range.block_begin; block < range.block_end; ++block) {
    load_factors(args.weight, args.out, block_rows(PLANES), block, factors);
    int64_t token = range.token_begin;
    for (; token + WIDE <= range.token_end; token += WIDE)
      blocks_by_tokens<PLANES, WIDE, G>(args, ahead, block, 0, token, &factors);
    for (; token + TOKENS <= range.token_end; token += TOKENS)
      blocks_by_tokens<PLANES, TOKENS, G>(args, ahead, block, 0, token, &factors);
    const int64_t left = range.token_end - token;
    if (left == 3) blocks_by_tokens<PLANES, 3, G>(args, ahead, block, 0, token, &factors);
    if (left == 2) blocks_by_tokens<PLANES, 2, G>(args, ahead, block, 0, token, &factors);
    if (left == 1) blocks_by_tokens<PLANES, 1, G>(args, ahead, block, 0, token, &factors);
  }
}

template <int PLANES>
inline void linear_i8(const LinearI8Args& args, const Range& range) {
  const bool free = args.weight.scale_kind == ScaleKind::group;
  if (args.weight.multiplier != nullptr) return blocks_i8<PLANES, Groups::multiplied>(args, range);
  if (!is_dense(PLANES) && free) return blocks_i8<PLANES, Groups::free>(args, range);
  blocks_i8<PLANES, Groups::none>(args, range);
}
