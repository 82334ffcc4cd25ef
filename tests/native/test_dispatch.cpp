// The table of instruction sets, and the record of which ran last, from several threads at once.
#include <cstring>

#include "harness.h"
#include "tests.h"

extern "C" {
const char* ternc_isa_at(int i);
const char* ternc_isa_missing(const char* name);
const char* ternc_isa_name();
int ternc_isa_force(const char* name);
const char* ternc_last_kernel(const void* weight);
void ternc_forget_kernel(const void* weight);
}

namespace ternc::tests {
namespace {

void check_table(const Isa* table, int count) {
  expect(std::strcmp(table[count - 1].name, "scalar") == 0, "the last resort is %s",
         table[count - 1].name);
  for (int i = 0; i < count; ++i) {
    const bool runs = ternc_isa_missing(table[i].name) == nullptr;
    expect(std::strcmp(ternc_isa_at(i), table[i].name) == 0, "entry %d", i);
    expect(runs == (table[i].missing() == nullptr), "%s: two answers", table[i].name);
    expect(!runs || table[i].kernels != nullptr, "%s runs and has no kernels", table[i].name);
    expect((ternc_isa_force(table[i].name) == 0) == runs, "%s: forced", table[i].name);
    if (runs) expect(std::strcmp(ternc_isa_name(), table[i].name) == 0, "%s", ternc_isa_name());
  }
  expect(ternc_isa_at(count) == nullptr && ternc_isa_at(-1) == nullptr, "past the end");
  expect(ternc_isa_missing("sse9") != nullptr && ternc_isa_force("sse9") == 1, "an unknown name");
  ternc_isa_force(nullptr);
}

// Each thread records and forgets its own weights, and reads everybody's.
void check_records(const Isa* isa) {
  constexpr int WEIGHTS = 64;
  static uint8_t weights[THREADS][WEIGHTS][64];
  on_threads([&](int i) {
    for (auto& weight : weights[i]) record_kernel(weight, isa);
    for (const auto& of_thread : weights)
      for (const auto& weight : of_thread) ternc_last_kernel(weight);
    for (int w = 0; w < WEIGHTS; w += 2) ternc_forget_kernel(weights[i][w]);
  });
  int forgotten = 0, known = 0;
  for (const auto& of_thread : weights)
    for (int w = 0; w < WEIGHTS; ++w) {
      const char* name = ternc_last_kernel(of_thread[w]);
      forgotten += w % 2 == 0 && name == nullptr;
      known += w % 2 == 1 && name != nullptr && std::strcmp(name, isa->name) == 0;
    }
  expect(forgotten == THREADS * WEIGHTS / 2, "%d weights are forgotten", forgotten);
  expect(known == THREADS * WEIGHTS / 2, "%d weights are known", known);
}

}  // namespace

void test_dispatch() {
  int count = 0;
  const Isa* table = isa_table(&count);
  check_table(table, count);
  const char* error = nullptr;
  on_threads([&](int) {
    const char* own = nullptr;
    active_isa(&own);
  });
  const Isa* active = active_isa(&error);
  expect(active != nullptr, "no instruction set is in use: %s", error == nullptr ? "" : error);
  if (active != nullptr) check_records(active);
}

}  // namespace ternc::tests
