// The walk of both linear kernels: blocks of rows, a few tokens at a time, spans of columns.
//
//   for each block of weight rows            the packed bytes of a block are one stream
//     for each 8 or 4 tokens                 the block comes from L2 from the second time on
//       for each span of columns             a group, or a piece whose bytes stay in L1
//         tile(fields, part): sums in registers, added to the totals of the block
//       y = (total * sx) * s + b
#pragma once

#include "dense.h"
#include "values.h"

constexpr int TOKENS = 4;
constexpr int MAX_TILE_BLOCKS = 2;
// Where registers allow, eight tokens share the decoding of a field: with two and three planes up
// to a quarter faster than four.
constexpr int WIDE_TOKENS = ACCUMULATORS >= 16 ? 8 : TOKENS;

// Fields and parts of a field that one tile keeps in registers for T tokens, and how many
// independent sums of each (successive steps) hide the latency of dot().
constexpr int tile_parts(int tokens) {
  return tokens == 1 && 2 * PARTS <= ACCUMULATORS ? PARTS : 1;
}
constexpr int tile_fields(int planes, int tokens) {
  if (planes == DENSE) return fields(DENSE);  // decoding is dear, and there are 32 registers
  const int shared = tokens > TOKENS ? tokens : tokens > 1 ? TOKENS : 1;
  const int room = ACCUMULATORS / (shared * tile_parts(tokens));
  return room >= fields(planes) ? fields(planes) : room >= 4 ? 4 : room >= 2 ? 2 : 1;
}
constexpr int tile_sets(int planes, int tokens, int blocks = 1) {
  const int sums = blocks * tokens * tile_parts(tokens) * tile_fields(planes, tokens);
  return sums >= 8 || 2 * sums > ACCUMULATORS ? 1 : 4 * sums > 8 ? 2 : 4;
}
// Fields of the tile that starts at field `first`.
constexpr int fields_from(int planes, int tokens, int first) {
  const int left = fields(planes) - first;
  return tile_fields(planes, tokens) < left ? tile_fields(planes, tokens) : left;
}
// One tile covers all rows of a block: no byte is read twice.
constexpr bool single_pass(int planes, int tokens) {
  return tile_parts(tokens) == PARTS && tile_fields(planes, tokens) == fields(planes);
}
// Blocks that one tile walks together, each from its own place of the range: their steps share the
// loads of q, and the prefetchers of the core, which follow a page each, have several to follow.
constexpr int tile_blocks(int planes, int tokens) {
  if (planes == EXPANDED || !single_pass(planes, tokens)) return 1;
  const int room = ACCUMULATORS / (tokens * tile_parts(tokens) * tile_fields(planes, tokens));
  return room < 1 ? 1 : room < MAX_TILE_BLOCKS ? room : MAX_TILE_BLOCKS;
}
constexpr int64_t PIECE_COLUMNS = 512;  // a tile's span where a block takes several passes
constexpr int64_t EXPANDED_BYTES = PIECE_COLUMNS / STEP_COLUMNS * step_bytes(EXPANDED);
// Bytes of a step in memory.
constexpr int stored_bytes(int planes) { return step_bytes(planes == EXPANDED ? DENSE : planes); }

inline Ahead ahead_of(const Weight& weight, int stored_bytes, Prefetch to, const Range& range) {
  const int64_t steps = ceil_div(weight.columns, STEP_COLUMNS);
  const int64_t bytes = range.block_end * steps * stored_bytes;
  return {to, reinterpret_cast<uintptr_t>(weight.bytes) + uintptr_t(bytes)};
}

// Row factors of one block: scale (1 where scales are free) and bias, in whole vectors.
struct RowFactors {
  const float *scale, *bias;  // bias: null where there is none
  int64_t first, count;       // rows of the weight that the block holds
  float scales[MAX_BLOCK_ROWS], biases[MAX_BLOCK_ROWS];
};

TERNC_NOINLINE void load_factors(const Weight& weight, const Output& out, int rows, int64_t block,
                                 RowFactors& factors) {
  const int64_t first = block * rows, left = weight.rows - first;
  const int64_t count = left < rows ? left : rows;
  factors.first = first;
  factors.count = count;
  if (count <= 0) return;  // padding alone
  factors.scale = factors.scales;
  factors.bias = out.bias == nullptr ? nullptr : factors.biases;
  if (weight.scale_kind != ScaleKind::row) {
    const float scale = weight.scale_kind == ScaleKind::tensor ? weight.scale[0] : 1.0f;
    for (int r = 0; r < rows; r += LANES) store_f32(factors.scales + r, splat_f32(scale));
  } else if (count == rows) {
    factors.scale = weight.scale + first;
  } else {
    for (int64_t r = 0; r < rows; ++r)
      factors.scales[r] = r < count ? weight.scale[first + r] : 0.0f;
  }
  if (out.bias == nullptr) return;
  for (int64_t r = count; r < rows; ++r) factors.biases[r] = 0.0f;
  widen_values(out.bias, out.bias_dtype, first, count, factors.biases);
}

// y[token, rows of the block] = (total * sx) * s + b; free scales are in the total already. total:
// whole vectors.
TERNC_NOINLINE void store_outputs(const float* total, float sx, const RowFactors& factors,
                                  const Weight& weight, const Output& out, int64_t token) {
  float values[MAX_BLOCK_ROWS];
  const int64_t count = factors.count, begin = token * weight.rows + factors.first;
  const bool direct = out.dtype == Dtype::f32 && count % LANES == 0;
  const auto* residual = static_cast<const float*>(direct ? out.residual : nullptr);
  float* y = direct ? static_cast<float*>(out.values) + begin : values;
  const f32 step = splat_f32(sx);
  for (int64_t r = 0; r < count; r += LANES) {
    f32 value = mul_f32(mul_f32(load_f32(total + r), step), load_f32(factors.scale + r));
    if (factors.bias != nullptr) value = add_f32(value, load_f32(factors.bias + r));
    if (residual != nullptr) value = add_f32(value, load_f32(residual + begin + r));
    store_f32(y + r, value);
  }
  if (direct) return;
  if (out.residual != nullptr) {
    float addend[MAX_BLOCK_ROWS];
    widen_values(out.residual, out.dtype, begin, count, addend);
    round_values(y, count, out.dtype);
    for (int64_t r = 0; r < count; ++r) y[r] += addend[r];
  }
  store_values(y, count, out.dtype, out.values, begin);
}

// total[r] += sum[r] * s[row, group] for the rows of one vector; free scales are [N, groups].
TERNC_NOINLINE void add_free(const float* sum, const Weight& weight, int64_t first, int64_t group,
                             float* total) {
  for (int r = 0; r < LANES && first + r < weight.rows; ++r)
    total[r] += sum[r] * weight.scale[(first + r) * weight.groups + group];
}
