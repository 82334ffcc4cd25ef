#include "harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ternc::tests {
namespace {

constexpr int64_t PRINTED_FAILURES = 20;

const char *current_isa = "", *current_test = "";
int64_t checks = 0, failures = 0;

#if !defined(TERNC_SANITIZED)
size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }
size_t whole_pages(size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}
#endif

void out_of_memory() {
  std::perror("driver: no memory");
  std::exit(2);
}

}  // namespace

void* allocate_exact(size_t bytes) {
  if (bytes == 0) return nullptr;
#if defined(TERNC_SANITIZED)
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) out_of_memory();
#else
  const size_t usable = whole_pages(bytes);
  void* base = mmap(nullptr, usable + page_bytes(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) out_of_memory();
  if (mprotect(static_cast<char*>(base) + usable, page_bytes(), PROT_NONE) != 0) out_of_memory();
  void* data = static_cast<char*>(base) + usable - bytes;
#endif
  std::memset(data, 0xff, bytes);
  return data;
}

void free_exact(void* data, size_t bytes) {
  if (data == nullptr) return;
#if defined(TERNC_SANITIZED)
  static_cast<void>(bytes);
  std::free(data);
#else
  const size_t usable = whole_pages(bytes);
  munmap(static_cast<char*>(data) + bytes - usable, usable + page_bytes());
#endif
}

// splitmix64
uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void begin_test(const char* isa, const char* test) { current_isa = isa, current_test = test; }

bool expect(bool ok, const char* format, ...) {
  ++checks;
  if (ok) return true;
  if (++failures > PRINTED_FAILURES) return false;
  std::printf("FAILED %s %s: ", current_isa, current_test);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  return false;
}

int64_t check_count() { return checks; }
int64_t failure_count() { return failures; }

void parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context) {
  on_threads([&](int i) {
    const int64_t pieces = ceil_div(count, grain);
    const int64_t begin = piece_begin(pieces, i) * grain, end = piece_begin(pieces, i + 1) * grain;
    if (begin < end) body(context, begin, end < count ? end : count);
  });
}

}  // namespace ternc::tests
