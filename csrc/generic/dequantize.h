// Packed weight -> rows of W [N, K] = s * (m * c): the bracket an exact integer, one fp32 rounding,
// one to the output type.
#pragma once

#include "dense.h"
#include "values.h"

constexpr int64_t DECODE_PIECE = 640;  // columns at a time: whole steps and whole base-3 bytes
constexpr int TRITS_PER_BYTE = 5;
constexpr int BYTE_VALUES = 243;

// Codes of lanes (layouts 11..14, 18): the four columns of a step are four bytes of one word.
inline void lane_codes(const DequantizeArgs& args, int64_t row, int64_t begin, int64_t count,
                       int8_t* codes) {
  const int rows = block_rows(args.planes), bytes_per_step = step_bytes(args.planes);
  const int64_t steps = ceil_div(args.weight.columns, STEP_COLUMNS), r = row % rows;
  const int field = int(r / FIELD_ROWS), lane = int(r % FIELD_ROWS);
  const uint8_t* step = args.weight.bytes +
                        (row / rows * steps + begin / STEP_COLUMNS) * bytes_per_step +
                        lane * STEP_COLUMNS;
  for (int64_t k = 0; k < count; k += STEP_COLUMNS, step += bytes_per_step) {
    uint32_t word, fifth = 0;
    const int vector = args.planes == INT8 ? field : args.planes == 3 ? field / 2 : 0;
    __builtin_memcpy(&word, step + 64 * vector, 4);
    if (args.planes == INT8) {
      __builtin_memcpy(codes + k, &word, 4);
      continue;
    }
    if (args.planes == DENSE) {
      for (int j = 0; j < STEP_COLUMNS; ++j) {
        const uint8_t byte = step[j];
        const int digit =
            field < 4 ? DENSE_TABLE.four[byte] >> (2 * field) & 3 : DENSE_TABLE.fifth[byte] >> 6;
        codes[k + j] = int8_t(digit - 1);
      }
      continue;
    }
    if (args.planes == 3) __builtin_memcpy(&fifth, step + 256, 4);
    word = args.planes == 1   ? word >> (2 * field) & 0x03030303u
           : args.planes == 2 ? word >> (4 * field) & 0x0f0f0f0fu
                              : word >> (4 * (field % 2)) & 0x0f0f0f0fu;
    word |= (fifth >> field & 0x01010101u) << 4;
    uint8_t unsigned_codes[STEP_COLUMNS];
    __builtin_memcpy(unsigned_codes, &word, 4);
    for (int j = 0; j < STEP_COLUMNS; ++j)
      codes[k + j] = int8_t(unsigned_codes[j] - code_max(args.planes));
  }
}

// Codes of rows (layouts 1..3 in base 3, 8 in bytes); an invalid base-3 byte gives zeros.
inline void row_codes(const DequantizeArgs& args, int64_t row, int64_t begin, int64_t count,
                      int8_t* codes) {
  if (args.planes == INT8) {
    __builtin_memcpy(codes, args.weight.bytes + row * args.weight.columns + begin, size_t(count));
    return;
  }
  const int64_t width = ceil_div(args.weight.columns, TRITS_PER_BYTE);
  for (int64_t k = 0; k < count; k += TRITS_PER_BYTE) {
    int8_t* at = codes + k;
    for (int i = 0; i < TRITS_PER_BYTE; ++i) at[i] = 0;
    for (int plane = 0; plane < args.planes; ++plane) {
      const int64_t offset =
          (plane * args.weight.rows + row) * width + (begin + k) / TRITS_PER_BYTE;
      int digits = args.weight.bytes[offset];
      if (digits >= BYTE_VALUES) digits = BYTE_VALUES / 2;  // five digits 1: five trits 0
      for (int i = 0; i < TRITS_PER_BYTE; ++i, digits /= 3)
        at[i] = int8_t(3 * at[i] + digits % 3 - 1);
    }
  }
}

// The wanted rows [out_begin, out_end).
inline void dequantize(const DequantizeArgs& args, int64_t out_begin, int64_t out_end) {
  const Weight& weight = args.weight;
  const int rows = args.at_rest ? 1 : block_rows(args.planes);
  int8_t codes[DECODE_PIECE + TRITS_PER_BYTE];
  float values[DECODE_PIECE];
  for (int64_t out_row = out_begin; out_row < out_end; ++out_row) {
    const int64_t row = args.index == nullptr ? out_row : args.index[out_row];
    for (int64_t begin = 0; begin < weight.columns; begin += DECODE_PIECE) {
      const int64_t left = weight.columns - begin;
      const int64_t count = left < DECODE_PIECE ? left : DECODE_PIECE;
      (args.at_rest ? row_codes : lane_codes)(args, row, begin, count, codes);
      for (int64_t k = 0; k < count;) {
        const int64_t g = (begin + k) / weight.group_size,
                      end = (g + 1) * weight.group_size - begin;
        const int64_t scale = weight.scale_kind == ScaleKind::tensor ? 0
                              : weight.scale_kind == ScaleKind::row  ? row
                                                                     : row * weight.groups + g;
        const float s = weight.scale[scale];
        const int m = weight.multiplier == nullptr
                          ? 1
                          : weight.multiplier[(row / rows * weight.groups + g) * rows + row % rows];
        for (; k < end && k < count; ++k) values[k] = s * float(m * codes[k]);
      }
      store_values(values, count, args.dtype, args.out, out_row * weight.columns + begin);
    }
  }
}
