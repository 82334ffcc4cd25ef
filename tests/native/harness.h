// What every test of the driver uses: exactly-sized memory, seeded numbers, checks that are
// counted, threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/ternc.h"

namespace ternc::tests {

// `bytes` bytes, all 0xff (NaN in every floating-point format), null where there are none, as
// torch's empty tensors are. Under a sanitizer from the heap; otherwise the last byte lies before a
// page that nobody may touch, which also stops what no sanitizer instruments.
void* allocate_exact(size_t bytes);
void free_exact(void* data, size_t bytes);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : count_(count), data_(static_cast<T*>(allocate_exact(size_t(count) * sizeof(T)))) {}
  Buffer(Buffer&& other) noexcept
      : count_(std::exchange(other.count_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(count_, other.count_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { free_exact(data_, size_t(count_) * sizeof(T)); }

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t count_ = 0;
  T* data_ = nullptr;
};

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  int64_t below(int64_t count) { return int64_t(next() % uint64_t(count)); }
  float uniform() { return float(int64_t(next() >> 40)) * 0x1p-23f - 1.0f; }  // [-1, 1)
  float normal() { return uniform() + uniform() + uniform(); }                // variance 1

 private:
  uint64_t state_;
};

void begin_test(const char* isa, const char* test);
// Counts; a check that fails is printed with the test it belongs to. Returns `ok`.
bool expect(bool ok, const char* format, ...) __attribute__((format(printf, 2, 3)));
int64_t check_count();
int64_t failure_count();

// Counts one check: `count` values equal bit for bit.
template <class T>
bool expect_same(const T* seen, const T* wanted, int64_t count, const char* what) {
  int64_t i = 0;
  while (i < count && std::memcmp(seen + i, wanted + i, sizeof(T)) == 0) ++i;
  return expect(i == count, "%s: value %lld of %lld differs: %g, wanted %g", what, (long long)i,
                (long long)count, i < count ? double(seen[i]) : 0.0,
                i < count ? double(wanted[i]) : 0.0);
}

constexpr int THREADS = 4;

// body(i) on THREADS threads at once.
template <class Body>
void on_threads(const Body& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < THREADS; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

// The i-th of THREADS pieces of [0, count) starts here.
inline int64_t piece_begin(int64_t count, int i) { return count * i / THREADS; }

// A ParallelFor on THREADS threads.
void parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context);

}  // namespace ternc::tests
