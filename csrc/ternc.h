// ternc.h: the C++ interface of the CPU kernels. Plain pointers and sizes, no torch.
//
//   x [M, K] --quantize--> q int8 [M, stride], sx [M], sums [M, spans]
//   q, packed weight [N, K] --linear_i8--> y [M, N]      y = (float(sum) * sx) * s[n] + b[n]
//   x, packed weight [N, K] --linear_f32--> y [M, N]     y = sum(x * c) * s[n] + b[n]
//   w [N, K] --fit--> codes, scale, multiplier
//   x --norm--> y --rotate--> q, sx                      one pass over a token
//   gate, up --activate--> act(gate) * up --rotate--> q, sx
//
// M = tokens, N = weight rows (out_features), K = columns (in_features) in every kernel.
//
// Resident layouts ("lanes"). A field is 16 weight rows; a step is 4 columns. Byte 4 * i + j of a
// 64-byte vector belongs to lane i (row i of its field) and column 4 * step + j:
//
//   planes 1, layout 11, 64 rows a block, 64 B a step: code + 1 in two bits
//     byte 4i+j   bits 7 6 | 5 4 | 3 2 | 1 0
//                 row 48+i | 32+i| 16+i| i
//   planes 2, layout 12, 32 rows a block, 64 B a step: code + 4 in a nibble
//     byte 4i+j   bits 7..4 | 3..0
//                 row  16+i | i
//   planes 3, layout 13, 128 rows a block, 320 B a step: low four bits of code + 13 in nibbles,
//     vectors v = 0..3   bits 7..4      | 3..0
//                        row 32v+16+i   | 32v+i
//     vector 4           bit b: fifth bit of row 16b+i
//   dense, layout 14, 1 plane in 1.6 bits, 80 rows a block, 64 B a step: digits d0..d4 = code + 1
//     of rows i, 16+i, .., 64+i, f = d0 + 3 d1 + 9 d2 + 27 d3:
//     f < 64:  bits 7 6 = d4 | 5..0 = f           f >= 64:  192 + 17 d4 + (f - 64)
//     (192 + 51 and above stand for zeros)
//   int8, layout 18, 64 rows a block, 256 B a step: code in a byte
//     vectors v = 0..3   row 16v+i
//   stream: [block][step][bytes of a step]; multiplier: [block][group][rows of a block], uint8.
//   Rows are padded to whole blocks and columns to whole steps with code 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ternc {

enum class Dtype : int { f32, bf16, f16 };
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

enum class ScaleKind : int { tensor, row, group };  // [1], [N], [N, groups] ("free" scales)

constexpr int FIELD_ROWS = 16;
constexpr int STEP_COLUMNS = 4;
constexpr int MAX_PLANES = 3;
constexpr int INT8 = 8;          // stands where a number of planes does: bytes, not trits
constexpr int DENSE = 4;         // likewise: one plane in 1.6 bits
constexpr int EXPANDED = 5;      // likewise, never stored: DENSE as two vectors, looked up bytewise
constexpr int WEIGHT_KINDS = 5;  // 1, 2, 3 planes, DENSE and INT8
constexpr int MAX_BLOCK_ROWS = 128;
constexpr int64_t MAX_COLUMNS = 131072;  // 131072 * 127 * 127 is the last sum that fits int32

constexpr bool is_dense(int planes) { return planes == DENSE || planes == EXPANDED; }
constexpr int block_rows(int planes) {
  return planes == 2 ? 32 : planes == 3 ? 128 : is_dense(planes) ? 80 : 64;
}
constexpr int step_bytes(int planes) {
  return planes == INT8 ? 256 : planes == 3 ? 320 : planes == EXPANDED ? 128 : 64;
}
constexpr int code_max(int planes) {
  return planes == 1 || is_dense(planes) ? 1 : planes == 2 ? 4 : planes == 3 ? 13 : 127;
}
// Place of the kernel for a kind of weight in the tables of `Kernels`.
constexpr int kind_index(int planes) { return planes == INT8 ? WEIGHT_KINDS - 1 : planes - 1; }
constexpr int multiplier_max(int planes) { return 127 / code_max(planes); }

// Tokens from which on tile products pay: four take 277 us without, 310 with (4096 -> 4096, one
// core of an Emerald Rapids), and far less where the tile unit is slow.
constexpr int64_t MIN_TILE_TOKENS = 5;
constexpr int64_t TILE_TOKENS = 16, TILE_COLUMNS = 64;

constexpr int64_t MAX_HADAMARD = 4096;
constexpr int64_t ROW_ALIGN = 16;  // values: fp32 scratch rows are padded to the widest vector

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t columns) { return ceil_div(columns, ROW_ALIGN) * ROW_ALIGN; }

// Short tokens that one-pass kernels take together: as many as fit a quarter of an L1 cache, 48 KB,
// which has their x, that of the next ones and a gain in it too.
constexpr int64_t GROUP_TOKENS = 8, GROUP_VALUES = 3072;
constexpr int64_t group_tokens(int64_t columns) {
  const int64_t count = GROUP_VALUES / (columns + 1) + 1;
  return count < GROUP_TOKENS ? count : GROUP_TOKENS;
}
// Floats of scratch of a one-pass kernel: gain and bias, or gate and up, and a group of tokens.
constexpr int64_t scratch_floats(int64_t columns) {
  return (2 + group_tokens(columns)) * padded(columns);
}

struct Weight {
  const uint8_t* bytes;
  const float* scale;
  const uint8_t* multiplier;  // null: 1 everywhere
  ScaleKind scale_kind;
  int64_t rows, columns;       // N, K
  int64_t group_size, groups;  // group_size = K and groups = 1 where the weight has no groups
};

// Whether kernels that take tiles take them for this weight, and then nothing else of q, but the
// sums where there are no multipliers.
inline bool reads_tiles(int planes, const Weight& weight) {
  return !is_dense(planes) && weight.scale_kind != ScaleKind::group &&
         !(planes == INT8 && weight.multiplier != nullptr);
}

// Tokens as the integer kernels read them. Columns past K up to `stride` hold 0.
struct Tokens {
  int8_t* q;      // [M, stride]; null where only tiles are read
  float* scale;   // [M]: one quantisation step a token; NaN where the token is not finite
  int32_t* sums;  // [M, groups]: sum of q over the columns of a group; null: not wanted
  int64_t count, stride;
  int8_t* tiles =
      nullptr;  // [ceil(M/16)][ceil(stride/64)][16 tokens][64 columns]; null: not wanted
};

struct Output {
  void* values;  // [M, N]
  Dtype dtype;
  const void* bias;  // [N] or null
  Dtype bias_dtype;
  const void* residual;       // [M, N] in `dtype` or null: added after the rounding, rounded again
  bool read_at_once = false;  // to be kept in the caches, however large
};

struct QuantizeArgs {
  const void* x;  // [M, K], contiguous
  Dtype dtype;
  int64_t columns, group_size, groups;  // as in Weight
  int bits;                             // 8 or 4
  Tokens out;
};

// How packed weights are fetched ahead: a property of the processor, not of the kernels. Into L1
// alone, from where the walk is; or into L2 first, from several places in front of it.
enum class Prefetch : int { l1, l2 };

struct LinearI8Args {
  Weight weight;
  Tokens tokens;
  Output out;
  Prefetch prefetch = Prefetch::l1;
};

struct LinearF32Args {
  Weight weight;
  const float* x;  // [M, stride], columns past K hold 0
  int64_t stride;
  Output out;
  Prefetch prefetch = Prefetch::l1;
};

constexpr int MAX_DIGITS = 4;

// Tokens as integers in base 256.
struct SplitArgs {
  const void* x;  // [M, K], contiguous
  Dtype dtype;
  int64_t columns;
  int digits;    // 3, or 4 of fp32
  int8_t* q;     // [M, digits, K]
  float* scale;  // [M, digits]
};

// The products of digits, to be summed.
struct JoinArgs {
  const float* parts;  // [M, digits, N]
  int digits;
  int64_t rows;
  Output out;
};

// Tokens in memory, `stride` elements from one to the next.
struct Rows {
  const void* values;
  Dtype dtype;
  int64_t stride;
};

// x -> (x * signs) blockdiag(H_block) / sqrt(block); block 0: x.
struct Rotation {
  const int8_t* signs;  // [padded(K)], +1 and -1; null: all +1
  int64_t block;        // a power of two that divides K
};

struct QuantizedRows {
  int8_t* q;     // [M, K]
  float* scale;  // [M]
  int bits;      // 8 or 4
};

// One factor or summand a column, plus an offset.
struct ColumnVector {
  const void* values;  // [K] or null
  Dtype dtype;
  float offset;
};

enum class Norm : int { rms, layer };

struct NormArgs {
  Rows x;
  int64_t columns;
  Norm kind;
  float eps;
  ColumnVector gain, bias;
  bool round_first;  // n is rounded to the dtype of x before the gain
  void* y;           // [M, K] in the dtype of x, or null: not wanted
  Rotation rotation;
  QuantizedRows out;
};

enum class Activation : int { none, silu, gelu, gelu_tanh, relu, relu2 };

struct ActivateArgs {
  Rows gate, up;  // up.values null: no product
  int64_t columns;
  Activation function;
  Rotation rotation;
  QuantizedRows out;  // read without h
  void* h;            // [M, K] in the dtype of gate, may be gate itself; or null
};

struct HadamardArgs {
  Rows x;
  int64_t columns;
  Rotation rotation;
  void* y;  // [M, K] in the dtype of x
};

// Attention: queries of a block at most (two vectors), and keys whose scores are held at once.
constexpr int64_t ATTENTION_ROWS = 32, ATTENTION_SPAN = 256;
constexpr int64_t attention_floats(int64_t columns, int64_t value_columns) {
  return (columns + ATTENTION_SPAN + value_columns) * ATTENTION_ROWS;
}

// Few queries: pairs of those that share keys, and the scores of a pair with room for a vector.
constexpr int64_t QUERY_PAIR = 2;
constexpr int64_t attention_row_floats(int64_t keys) { return (keys + 16) * QUERY_PAIR; }

struct AttentionArgs {
  const float *q, *k, *v;    // [B, H, L, D], [B, G, S, D], [B, G, S, Dv]
  float* y;                  // [B, L, H, Dv]
  int64_t heads, key_heads;  // H, G; G divides H
  int64_t queries, keys;     // L, S
  int64_t columns, value_columns;
  float scale;
  bool causal;  // query i sees the keys up to i
  // Few queries alone: 0 hides a key; strides over B, H, L, S. Null: none is hidden.
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0, mask_key = 0;
};

// Half-open ranges of weight blocks and of tokens: one call computes their product.
struct Range {
  int64_t block_begin, block_end, token_begin, token_end;
};

struct DequantizeArgs {
  Weight weight;
  int planes;
  bool at_rest;  // rows (layouts 1..3 in base 3, 8 in bytes) instead of lanes
  void* out;     // [rows wanted, K]
  Dtype dtype;
  const int64_t* index = nullptr;  // the weight rows that are wanted, in order; null: all
};

// Weights divided by 2^exponent lie in (-1, 1): magnitudes near the ends of fp32 fit like any
// other.
struct FitArgs {
  const void* w;  // [N, K], contiguous
  Dtype dtype;
  int64_t rows, columns;
  int64_t group_size, groups;  // group_size = K and groups = 1 where there are no groups
  int planes, refine;
  uint8_t* multiplier;  // [N, groups]; null: none
  int8_t* codes;        // [N, K]
};

// sum(w * c) and sum(c * c) over the codes c = clip(rint(w / step), +-code_max) of one step.
struct SnapSums {
  double weight_code, code_code;
};

// Candidate steps in units of max|w| / code_max, geometric: Gaussian groups of 128 want 0.5 to 0.9.
constexpr int CANDIDATES = 14;
constexpr double FIRST_RATIO = 0.3, RATIO = 1.1011612;  // 0.3 * RATIO^13 = 1.05
// Heavy tails want less: the search goes on below FIRST_RATIO while the error falls.
constexpr int MORE_CANDIDATES = 40;
constexpr int LLOYD_ROUNDS = 2;

// The kernels of one instruction set. Index [kind_index(planes)] where there are several.
struct Kernels {
  void (*quantize)(const QuantizeArgs&, int64_t token_begin, int64_t token_end);
  void (*widen)(const void* x, Dtype, int64_t columns, float* out, int64_t stride,
                int64_t token_begin, int64_t token_end);
  // sums[token, g] of q [M, stride] over the columns of each group.
  void (*sum_groups)(const Tokens&, int64_t columns, int64_t group_size, int64_t groups,
                     int64_t token_begin, int64_t token_end);
  // q [stride] of one token -> its rows of `tiles`, for kernels that read them; else null. q null:
  // zeros, for the rows of the last tile that are no token's.
  void (*tile_token)(const int8_t* q, int64_t stride, int64_t token, int8_t* tiles);
  // scratch: scratch_floats(K).
  void (*norm)(const NormArgs&, int64_t token_begin, int64_t token_end, float* scratch);
  void (*activate)(const ActivateArgs&, int64_t token_begin, int64_t token_end, float* scratch);
  void (*hadamard)(const HadamardArgs&, int64_t token_begin, int64_t token_end, float* scratch);
  // Blocks [begin, end) of query_rows queries, ceil(L / query_rows) of each of B * H heads.
  // scratch: attention_floats.
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end, float* scratch);
  int query_rows;  // of a block
  // The same for few queries, or with a mask: pairs [begin, end), ceil(H / G * L / 2) of each of
  // B * G key heads. scratch: attention_row_floats.
  void (*attention_rows)(const AttentionArgs&, int64_t begin, int64_t end, float* scratch);
  void (*linear_i8[WEIGHT_KINDS])(const LinearI8Args&, const Range&);
  void (*linear_f32[WEIGHT_KINDS])(const LinearF32Args&, const Range&);
  // Into how many digits a token of K floating-point values may be split() to go through linear_i8
  // and join(); 0: into none, it goes through linear_f32. Null where that is as fast.
  int (*digits)(const void* x, Dtype, int64_t begin, int64_t columns);
  void (*split)(const SplitArgs&, int64_t token_begin, int64_t token_end);
  void (*join)(const JoinArgs&, int64_t token_begin, int64_t token_end);
  void (*dequantize)(const DequantizeArgs&, int64_t row_begin, int64_t row_end);
  // Largest |w| of `count` values as the bits of a float; above 0x7f7fffff: not finite.
  uint32_t (*largest)(const void* w, Dtype, int64_t begin, int64_t count);
  // out[i] = |w[begin + i]| / 2^exponent
  void (*magnitudes)(const FitArgs&, int exponent, int64_t begin, int64_t count, float* out);
  // Real scale of each row, before its rounding, and its multipliers. scratch: fit_scratch floats.
  void (*fit_rows)(const FitArgs&, int64_t row_begin, int64_t row_end, float* scratch,
                   double* scale);
  // Codes for the rounded scales; scale_stride 1, or 0 where all rows share one.
  void (*snap_rows)(const FitArgs&, int64_t row_begin, int64_t row_end, float* scratch,
                    const float* scale, int64_t scale_stride);
  // Adds the sums over magnitudes[0, count) for each of the `steps` steps.
  void (*snap_sums)(const float* magnitudes, int64_t count, int planes, const double* step,
                    int steps, SnapSums* sums);
};

constexpr int64_t fit_scratch(int64_t columns) { return 4 * columns; }

struct Isa {
  const char* name;
  const char* (*missing)();  // null, or why this machine cannot run it
  const Kernels* kernels;    // null where it is not built for this architecture
};

// Every instruction set known to the source, best first; `count` entries.
const Isa* isa_table(int* count);

// The instruction set in use: TERNC_ISA if set, else the best available.
// Null if TERNC_ISA names none that can run here; `*error` then says why (static storage).
const Isa* active_isa(const char** error);

// Into which cache this processor wants weights fetched ahead.
Prefetch preferred_prefetch();

// Remembers which kernels ran last on the packed weight at this address.
void record_kernel(const void* weight, const Isa* isa);

// Runs body(context, begin, end) over pieces of [0, count), each at least `grain` long.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, ParallelBody body, void* context);

// w -> codes, scale, multiplier by the tied fit; scale is [1] where `tensor_scale`, else [N].
// False where w holds NaN or infinity. Throws std::bad_alloc.
bool fit(const FitArgs& args, bool tensor_scale, float* scale, const Kernels& kernels,
         ParallelFor parallel);

}  // namespace ternc
