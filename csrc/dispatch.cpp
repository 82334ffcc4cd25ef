// Which instruction sets exist, which of them this machine can run, which one is in use, and
// which kernels ran last on which weight.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "target.h"
#include "ternc.h"

#if defined(__x86_64__)
  #include <cpuid.h>
  #include <sys/syscall.h>
  #include <unistd.h>
#elif defined(__aarch64__)
  #include <sys/auxv.h>
#endif

namespace ternc {

namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
namespace neon_dotprod {
extern const Kernels kernels;
}
#endif
#if defined(TERNC_HAS_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
#if defined(TERNC_HAS_AVX_VNNI)
namespace avxvnni {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(__x86_64__)
struct Cpu {
  uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0, state = 0;

  Cpu() {
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_ebx = b, leaf7_ecx = c, leaf7_edx = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_eax = a;
    if (leaf1_ecx >> 27 & 1) {  // OSXSAVE: the registers that the operating system saves
      uint32_t low, high;
      __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      state = low;
    }
  }
};

bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

const char* avx2_missing() {
  const Cpu cpu;
  if (!has(cpu.leaf1_ecx, 1u << 12 | 1u << 28 | 1u << 29))
    return "this CPU has no AVX, no FMA or no F16C";
  if (!has(cpu.leaf7_ebx, 1u << 5)) return "this CPU has no AVX2";
  if (!has(cpu.state, 0x06)) return "the operating system does not save AVX registers";
  return nullptr;
}

  #if defined(TERNC_HAS_AVX_VNNI)
const char* avxvnni_missing() {
  const Cpu cpu;
  if (const char* reason = avx2_missing()) return reason;
  return has(cpu.leaf7_1_eax, 1u << 4) ? nullptr : "this CPU has no AVX-VNNI";
}
constexpr const Kernels* AVXVNNI = &avxvnni::kernels;
  #else
const char* avxvnni_missing() { return "the library was built by a compiler without AVX-VNNI"; }
constexpr const Kernels* AVXVNNI = nullptr;
  #endif

const char* avx512vnni_missing() {
  const Cpu cpu;
  if (const char* reason = avx2_missing()) return reason;
  if (!has(cpu.leaf7_ebx, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31))
    return "this CPU has no AVX-512 F, DQ, BW and VL";
  if (!has(cpu.leaf7_ecx, 1u << 11)) return "this CPU has no AVX-512 VNNI";
  if (!has(cpu.state, 0xe6)) return "the operating system does not save AVX-512 registers";
  return nullptr;
}

  #if defined(TERNC_HAS_AMX)
// Linux hands the tile registers out on request, to the whole process and for good.
bool tiles_permitted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return permitted;
}

const char* amx_missing() {
  const Cpu cpu;
  if (const char* reason = avx512vnni_missing()) return reason;
  if (!has(cpu.leaf7_edx, 1u << 24 | 1u << 25)) return "this CPU has no AMX int8";
  if (!has(cpu.leaf7_ecx, 1u << 1)) return "this CPU has no AVX-512 VBMI";
  if (!has(cpu.state, 3u << 17)) return "the operating system does not save AMX registers";
  if (!tiles_permitted()) return "Linux refused this process the AMX registers";
  return nullptr;
}
constexpr const Kernels* AMX = &amx::kernels;
  #else
const char* amx_missing() { return "the library was built by a compiler without AMX"; }
constexpr const Kernels* AMX = nullptr;
  #endif
constexpr const Kernels* AVX2 = &avx2::kernels;
constexpr const Kernels* AVX512VNNI = &avx512vnni::kernels;
#else
const char* avx2_missing() { return "not an x86-64 machine"; }
const char* avx512vnni_missing() { return "not an x86-64 machine"; }
const char* avxvnni_missing() { return "not an x86-64 machine"; }
const char* amx_missing() { return "not an x86-64 machine"; }
constexpr const Kernels* AVX2 = nullptr;
constexpr const Kernels* AVX512VNNI = nullptr;
constexpr const Kernels* AVXVNNI = nullptr;
constexpr const Kernels* AMX = nullptr;
#endif

#if defined(__aarch64__)
const char* neon_missing() {
  constexpr unsigned long ASIMD = 1ul << 1;
  return getauxval(AT_HWCAP) & ASIMD ? nullptr : "this CPU has no NEON";
}

const char* neon_dotprod_missing() {
  constexpr unsigned long ASIMDDP = 1ul << 20;
  return getauxval(AT_HWCAP) & ASIMDDP ? nullptr : "this CPU has no dot product (asimddp)";
}
constexpr const Kernels* NEON = &neon::kernels;
constexpr const Kernels* NEON_DOTPROD = &neon_dotprod::kernels;
#else
const char* neon_missing() { return "not an aarch64 machine"; }
const char* neon_dotprod_missing() { return "not an aarch64 machine"; }
constexpr const Kernels* NEON = nullptr;
constexpr const Kernels* NEON_DOTPROD = nullptr;
#endif

const char* scalar_missing() { return nullptr; }

// clang-format off: one line each
constexpr Isa TABLE[] = {
    {"amx", amx_missing, AMX},
    {"avx512vnni", avx512vnni_missing, AVX512VNNI},
    {"avxvnni", avxvnni_missing, AVXVNNI},
    {"avx2", avx2_missing, AVX2},
    {"neon_dotprod", neon_dotprod_missing, NEON_DOTPROD},
    {"neon", neon_missing, NEON},
    {"scalar", scalar_missing, &scalar::kernels},
};
// clang-format on
constexpr int ISA_COUNT = sizeof(TABLE) / sizeof(TABLE[0]);

std::atomic<const Isa*> forced{nullptr};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : TABLE)
    if (std::strcmp(isa.name, name) == 0) return &isa;
  return nullptr;
}

struct Choice {
  const Isa* isa = nullptr;
  char error[256] = "";

  Choice() {
    const char* wanted = std::getenv("TERNC_ISA");
    if (wanted == nullptr || *wanted == '\0') {
      for (int i = 0; isa == nullptr; ++i)
        if (TABLE[i].missing() == nullptr) isa = &TABLE[i];
      return;
    }
    const Isa* found = find_isa(wanted);
    if (found == nullptr) {
      int used =
          std::snprintf(error, sizeof error,
                        "TERNC_ISA=%.32s is not an instruction set ternc has; use one of", wanted);
      for (const Isa& isa_known : TABLE)
        used += std::snprintf(error + used, sizeof error - used, " %s", isa_known.name);
    } else if (const char* reason = found->missing()) {
      std::snprintf(error, sizeof error, "TERNC_ISA=%s cannot run here: %s", found->name, reason);
    } else {
      isa = found;
    }
  }
};

// weight address -> index of its Isa + 1. One word an entry (index in the top byte, which user
// addresses leave free), so that a reader never sees half an entry; a full bucket loses its
// oldest guess, which costs a report one kernel name and nothing else.
constexpr int RECORDS = 1 << 14, BUCKET = 8, INDEX_SHIFT = 56;
constexpr uint64_t ADDRESS = (uint64_t(1) << INDEX_SHIFT) - 1;
std::atomic<uint64_t> records[RECORDS];

std::atomic<uint64_t>* bucket_of(uint64_t address) {
  const uint64_t hash = (address >> 4) * 0x9e3779b97f4a7c15u;
  return &records[(hash >> 40) % (RECORDS / BUCKET) * BUCKET];
}

void write_record(const void* weight, uint64_t index, bool insert) {
  const uint64_t address = reinterpret_cast<uint64_t>(weight) & ADDRESS;
  const uint64_t entry = index == 0 ? 0 : index << INDEX_SHIFT | address;
  std::atomic<uint64_t>* bucket = bucket_of(address);
  std::atomic<uint64_t>* slot = nullptr;
  for (int i = 0; i < BUCKET; ++i) {
    const uint64_t seen = bucket[i].load(std::memory_order_relaxed);
    if (seen == entry && insert) return;  // the usual case writes no shared cache line
    if ((seen & ADDRESS) == address && seen != 0) {
      slot = &bucket[i];
      break;
    }
    if (seen == 0 && slot == nullptr) slot = &bucket[i];
  }
  if (!insert && (slot == nullptr || slot->load(std::memory_order_relaxed) == 0)) return;
  if (slot == nullptr) slot = &bucket[(address >> 6) % BUCKET];
  slot->store(entry, std::memory_order_relaxed);
}

}  // namespace

const Isa* isa_table(int* count) {
  *count = ISA_COUNT;
  return TABLE;
}

const Isa* active_isa(const char** error) {
  if (const Isa* isa = forced.load(std::memory_order_acquire)) return isa;
  static const Choice choice;
  *error = choice.error;
  return choice.isa;
}

Prefetch preferred_prefetch() {
#if defined(__x86_64__)
  static const bool amd = [] {
    uint32_t a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
  }();
  return amd ? Prefetch::l1 : Prefetch::l2;
#else
  return Prefetch::l1;
#endif
}

void record_kernel(const void* weight, const Isa* isa) {
  write_record(weight, uint64_t(isa - TABLE) + 1, true);
}

}  // namespace ternc

// What runtime/cpu.py calls through ctypes.
extern "C" {
#define TERNC_EXPORT __attribute__((visibility("default")))

// Name of the i-th instruction set of the table, best first; null past the end.
TERNC_EXPORT const char* ternc_isa_at(int i) {
  return i >= 0 && i < ternc::ISA_COUNT ? ternc::TABLE[i].name : nullptr;
}

// Null if this machine can run `name`, else the reason.
TERNC_EXPORT const char* ternc_isa_missing(const char* name) {
  const ternc::Isa* isa = ternc::find_isa(name);
  return isa == nullptr ? "unknown instruction set" : isa->missing();
}

// Name of the instruction set in use; null if TERNC_ISA names none (see ternc_isa_error).
TERNC_EXPORT const char* ternc_isa_name() {
  const char* error = nullptr;
  const ternc::Isa* isa = ternc::active_isa(&error);
  return isa == nullptr ? nullptr : isa->name;
}

// 1 where the kernels in use multiply DENSE weights as fast as any others from every cache.
TERNC_EXPORT int ternc_likes_dense() {
#if defined(__x86_64__)
  const char* error = nullptr;
  const ternc::Isa* isa = ternc::active_isa(&error);
  const bool vbmi = ternc::has(ternc::Cpu().leaf7_ecx, 1u << 1);
  return isa != nullptr && isa->kernels == ternc::AVX512VNNI && vbmi;
#else
  return 0;
#endif
}

TERNC_EXPORT const char* ternc_isa_error() {
  const char* error = nullptr;
  return ternc::active_isa(&error) == nullptr ? error : nullptr;
}

// Uses `name` from now on in the whole process (null: back to the choice at start).
// Returns 0, or 1 if this machine cannot run it.
TERNC_EXPORT int ternc_isa_force(const char* name) {
  const ternc::Isa* isa = name == nullptr ? nullptr : ternc::find_isa(name);
  if (name != nullptr && (isa == nullptr || isa->missing() != nullptr)) return 1;
  ternc::forced.store(isa, std::memory_order_release);
  return 0;
}

// Instruction set whose kernels ran last on the packed weight at this address, or null.
TERNC_EXPORT const char* ternc_last_kernel(const void* weight) {
  const uint64_t address = reinterpret_cast<uint64_t>(weight) & ternc::ADDRESS;
  const std::atomic<uint64_t>* bucket = ternc::bucket_of(address);
  for (int i = 0; i < ternc::BUCKET; ++i) {
    const uint64_t entry = bucket[i].load(std::memory_order_relaxed);
    if (entry != 0 && (entry & ternc::ADDRESS) == address)
      return ternc::TABLE[(entry >> ternc::INDEX_SHIFT) - 1].name;
  }
  return nullptr;
}

TERNC_EXPORT void ternc_forget_kernel(const void* weight) { ternc::write_record(weight, 0, false); }
}
