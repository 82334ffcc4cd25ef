// Drives every kernel of every instruction set that this machine has, without torch, against the
// scalar definitions beside this file:   driver [instruction set ...]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "harness.h"
#include "tests.h"

namespace ternc::tests {
namespace {

struct Test {
  const char* name;
  void (*run)(const Kernels& kernels);
};

constexpr Test TESTS[] = {
    {"quantize", test_quantize},     {"linear_i8", test_linear_i8}, {"linear_f32", test_linear_f32},
    {"dequantize", test_dequantize}, {"hadamard", test_hadamard},   {"norm", test_norm},
    {"activate", test_activate},     {"attention", test_attention}, {"fit", test_fit},
};

void report(const char* isa, const char* test, int64_t checks_before) {
  std::printf("%-12s  %-10s  %6lld checks\n", isa, test,
              (long long)(check_count() - checks_before));
  std::fflush(stdout);
}

void run_isa(const Isa& isa) {
  for (const Test& test : TESTS) {
    const int64_t before = check_count();
    begin_test(isa.name, test.name);
    test.run(*isa.kernels);
    report(isa.name, test.name, before);
  }
}

// Why the instruction set cannot run here. Sanitized, AMX has emulated tiles and needs none.
const char* missing(const Isa& isa) {
#if defined(TERNC_SANITIZED)
  if (std::strcmp(isa.name, "amx") == 0)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")
               ? nullptr
               : "this CPU has no AVX-512 VNNI and VBMI to emulate tiles with";
#endif
  return isa.missing();
}

int run(const std::vector<std::string>& wanted) {
  int count = 0, found = 0;
  const Isa* table = isa_table(&count);
  for (int i = 0; i < count; ++i) {
    const bool named = std::find(wanted.begin(), wanted.end(), table[i].name) != wanted.end();
    if (!wanted.empty() && !named) continue;
    const char* reason = missing(table[i]);
    found += reason == nullptr;
    if (reason == nullptr)
      run_isa(table[i]);
    else
      std::printf("%-12s  not run: %s\n", table[i].name, reason);
  }
  const int64_t before = check_count();
  begin_test("dispatch", "");
  test_dispatch();
  report("dispatch", "", before);
  if (found < int(std::max<size_t>(wanted.size(), 1))) {
    std::printf("some of the instruction sets asked for did not run\n");
    return 1;
  }
  std::printf("%lld checks, %lld failed\n", (long long)check_count(), (long long)failure_count());
  return failure_count() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace ternc::tests

int main(int argc, char** argv) { return ternc::tests::run({argv + 1, argv + argc}); }
