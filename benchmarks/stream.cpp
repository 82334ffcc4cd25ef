// The memory read limit: touches every byte of a buffer once, as fast as one thread can.
#include <cstddef>
#include <cstdint>

extern "C" uint64_t read_all(const uint64_t* words, size_t count) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(words + i) + 4096), 0, 2);
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}
