// The AMX instructions that csrc/amx uses, in plain C++: for machines without them. Included before
// anything else (-include), so that the kernel's own source stays as it is.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Config {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Config config;  // palette 0: not configured
inline thread_local int8_t tile[8][16][64];

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof config);
  check(config.palette == 1 && config.start == 0, "palette 1 has the eight tiles");
  for (int t = 0; t < 8; ++t)
    check(config.rows[t] >= 1 && config.rows[t] <= 16 && config.row_bytes[t] <= 64, "tile size");
  std::memset(tile, 0, sizeof tile);
}

inline void release() { std::memset(&config, 0, sizeof config); }

inline void zero(int t) {
  check(config.palette == 1, "zeroed without a configuration");
  std::memset(tile[t], 0, sizeof tile[t]);
}

inline void load(int t, const void* from, int64_t stride) {
  check(config.palette == 1, "loaded without a configuration");
  std::memset(tile[t], 0, sizeof tile[t]);
  for (int r = 0; r < config.rows[t]; ++r)
    std::memcpy(tile[t][r], static_cast<const char*>(from) + r * stride, config.row_bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
  check(config.palette == 1, "stored without a configuration");
  for (int r = 0; r < config.rows[t]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile[t][r], config.row_bytes[t]);
}

// c [m][n] += sum over 4 k of a [m][4 k] * b [k][4 n]: signed bytes a, bytes b of type B.
template <class B>
void multiply(int c, int a, int b) {
  check(config.rows[c] == config.rows[a], "C and A differ in rows");
  check(config.row_bytes[c] == config.row_bytes[b], "C and B differ in columns");
  check(config.row_bytes[a] == 4 * config.rows[b], "A's columns are not B's rows");
  for (int m = 0; m < config.rows[c]; ++m)
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, &tile[c][m][4 * n], 4);
      for (int k = 0; k < config.row_bytes[a]; ++k)
        sum += uint32_t(tile[a][m][k] * B(tile[b][k / 4][4 * n + k % 4]));
      std::memcpy(&tile[c][m][4 * n], &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() emulated::release()
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_dpbssd(c, a, b) emulated::multiply<int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) emulated::multiply<uint8_t>(c, a, b)
