// What this machine allows: reading memory, and the bare multiply instructions of each instruction
// set. Threads meet at a gate, and every one reports when it began and ended.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

namespace {

std::atomic<int> waiting{0};

struct Times {
  double begin, end;  // seconds
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double pass_gate() {
  waiting.fetch_sub(1);
  while (waiting.load(std::memory_order_acquire) > 0) {
  }
  return now();
}

constexpr size_t LINE = 64;
// The best of 23 ways to read (one to 16 streams; into L1 or L2, 0 to 64 KB ahead), to 1 %: two
// streams with 4 KB are 3 to 5 % slower on Zen 5, 3 % on Emerald Rapids.
constexpr size_t AHEAD = 2048;
constexpr int STREAMS = 4;

using vector = uint64_t __attribute__((vector_size(16), aligned(16), may_alias));

#if defined(__x86_64__)
  #define TARGET(features) __attribute__((target(features)))
// Independent sums: four or five cycles of latency, two multipliers, and 16 registers in AVX.
constexpr int SUMS = 16, AVX_SUMS = 12;

// Each returns the operations (a multiplication and an addition are two) of `rounds` rounds.
TARGET("avx512f,avx512vnni") int64_t vpdpbusd_512(int64_t rounds) {
  __m512i sum[SUMS], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  #pragma GCC unroll 16
  for (int j = 0; j < SUMS; ++j) sum[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i)
  #pragma GCC unroll 16
    for (int j = 0; j < SUMS; ++j) {
      sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
      __asm__ volatile("" : "+v"(sum[j]));
    }
  return rounds * SUMS * 128;
}

  #if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
    #define HAS_AVX_VNNI 1
TARGET("avx2,avxvnni") int64_t vpdpbusd_256(int64_t rounds) {
  __m256i sum[AVX_SUMS], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
    #pragma GCC unroll 16
  for (int j = 0; j < AVX_SUMS; ++j) sum[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < rounds; ++i)
    #pragma GCC unroll 16
    for (int j = 0; j < AVX_SUMS; ++j) {
      sum[j] = _mm256_dpbusd_avx_epi32(sum[j], a, b);
      __asm__ volatile("" : "+x"(sum[j]));
    }
  return rounds * AVX_SUMS * 64;
}
  #endif

// vpmaddubsw and the 16-bit addition that keeps its sums.
TARGET("avx2") int64_t vpmaddubsw(int64_t rounds) {
  __m256i sum[AVX_SUMS], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  #pragma GCC unroll 16
  for (int j = 0; j < AVX_SUMS; ++j) sum[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < rounds; ++i)
  #pragma GCC unroll 16
    for (int j = 0; j < AVX_SUMS; ++j) {
      __asm__ volatile("" : "+x"(a));
      sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(a, b));
      __asm__ volatile("" : "+x"(sum[j]));
    }
  return rounds * AVX_SUMS * 64;
}

  #if __has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>)
    #define HAS_AMX 1
    #define TILES "amx-tile,amx-int8"
struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

TARGET(TILES) void load_tile_config() {
  TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // GCC 12 thinks that ldtilecfg reads 8 bytes, and drops the other stores.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Four tile products, with four tile loads from L1 where LOADS.
template <bool LOADS>
TARGET(TILES)
int64_t tiles(int64_t rounds) {
  alignas(64) int8_t bytes[4][1024];
  std::memset(bytes, 1, sizeof bytes);
  load_tile_config();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes[0], 64);
  _tile_loadd(5, bytes[1], 64);
  _tile_loadd(6, bytes[2], 64);
  _tile_loadd(7, bytes[3], 64);
  for (int64_t i = 0; i < rounds; ++i) {
    if (LOADS) {
      _tile_loadd(4, bytes[0], 64);
      _tile_loadd(5, bytes[1], 64);
      _tile_loadd(6, bytes[2], 64);
      _tile_loadd(7, bytes[3], 64);
    }
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * 2 * 16 * 16 * 64;
}
  #endif
#endif

struct Unit {
  const char* name;
  int64_t (*run)(int64_t rounds);
};

constexpr Unit UNITS[] = {
#if defined(__x86_64__)
    {"vpdpbusd 512", vpdpbusd_512},
  #if defined(HAS_AVX_VNNI)
    {"vpdpbusd 256", vpdpbusd_256},
  #endif
    {"vpmaddubsw 256", vpmaddubsw},
  #if defined(HAS_AMX)
    {"tdpbssd", tiles<false>},
    {"tdpbssd with loads", tiles<true>},
  #endif
#endif
    {nullptr, nullptr},
};

}  // namespace

extern "C" {

// The next `threads` calls of read_all or multiply begin together.
void close_gate(int threads) { waiting.store(threads); }

// Touches every byte of `count`, a multiple of 4 KB at a 64-byte boundary, once.
void read_all(const uint8_t* bytes, size_t count, Times* times) {
  constexpr int VECTORS = LINE / sizeof(vector);
  const size_t part = count / STREAMS;
  vector sum[STREAMS];
#pragma GCC unroll 4
  for (vector& s : sum) s = vector{};
  times->begin = pass_gate();
  for (size_t i = 0; i < part; i += LINE)
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; ++s) {
      const uint8_t* at = bytes + s * part + i;
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(at) + AHEAD), 0, 3);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[s] |= reinterpret_cast<const vector*>(at)[v];
    }
  const vector all = sum[0] | sum[1] | sum[2] | sum[3];
  __asm__ volatile("" : : "m"(all));
  times->end = now();
}

// Runs `rounds` of a multiply unit; its operations, or 0 where this build does not have it.
int64_t multiply(const char* name, int64_t rounds, Times* times) {
  times->begin = pass_gate();
  int64_t operations = 0;
  for (const Unit* unit = UNITS; unit->name != nullptr; ++unit)
    if (std::strcmp(unit->name, name) == 0) operations = unit->run(rounds);
  times->end = now();
  return operations;
}
}
