// DENSE bytes -> EXPANDED: a vector of four fields in two bits each, and one of the fifth in its
// bits 7 and 6. By table, a byte at a time: for instruction sets without byte permutations.
#pragma once

#include "decode.h"

struct DenseTable {
  uint8_t four[256], fifth[256];
};

constexpr DenseTable dense_table() {
  DenseTable table = {};
  for (int byte = 0; byte < 256; ++byte) {
    const int rest = byte - 192;
    int four = byte & 63, fifth = byte >> 6;
    if (rest >= 0) four = rest < 51 ? 64 + rest % 17 : 40, fifth = rest < 51 ? rest / 17 : 1;
    table.fifth[byte] = uint8_t(fifth << 6);
    for (int f = 0; f < 4; ++f, four /= 3) table.four[byte] |= uint8_t(four % 3 << 2 * f);
  }
  return table;
}
constexpr DenseTable DENSE_TABLE = dense_table();

TERNC_NOINLINE void expand(const uint8_t* from, int64_t steps, uint8_t* to, const Ahead& ahead) {
  constexpr int VECTOR = step_bytes(DENSE);
  for (int64_t s = 0; s < steps; ++s, from += VECTOR, to += 2 * VECTOR) {
    prefetch_window<DENSE>(from, s, ahead);
    prefetch_step<DENSE>(from);
    for (int i = 0; i < VECTOR; ++i) {
      to[i] = DENSE_TABLE.four[from[i]];
      to[VECTOR + i] = DENSE_TABLE.fifth[from[i]];
    }
  }
}
