#include "isa.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#if defined(TRILBY_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace trilby {

namespace baseline { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif
#if defined(TRILBY_HAS_AVX512BF16)
namespace avx512bf16 { extern const Kernels table; }
#endif
#if defined(TRILBY_HAS_AMX)
namespace amx {
extern const Kernels table;
bool tiles_are_right();
}  // namespace amx
#endif

namespace {

// A level that needs nothing but the processor's and the kernel's word. __builtin_cpu_supports asks both (CPUID; XCR0:
// are the wide registers saved?).
struct Vectors {
  const Kernels* levels[4];
  int count = 0;

  Vectors() {
    levels[count++] = &baseline::table;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      levels[count++] = &avx2::table;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")) {
        levels[count++] = &avx512::table;
#if defined(TRILBY_HAS_AVX512BF16)
        if (__builtin_cpu_supports("avx512bf16")) levels[count++] = &avx512bf16::table;
#endif
      }
    }
#endif
  }

  const Kernels* named(const char* level) const {
    for (int i = 0; i < count; i++) {
      if (std::strcmp(levels[i]->level, level) == 0) return levels[i];
    }
    return nullptr;
  }
};

const Vectors& vectors() {
  static const Vectors machine;
  return machine;
}

#if defined(TRILBY_HAS_AMX)
bool processor_has_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AVX512_BF16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16);
}

// Tiles are 8 KiB more to save of a thread, and Linux (5.16 and newer) makes room only for processes that ask. It
// grants nothing that XCR0 lacks.
bool kernel_permits_tiles() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

std::string reason_against_tiles() {
  if (!vectors().named("avx512") || !processor_has_tiles()) return "the processor has no AMX-bf16";
  if (!kernel_permits_tiles()) return std::string("the kernel does not permit AMX: ") + std::strerror(errno);
  if (!amx::tiles_are_right()) return "a product by AMX, computed as a check, is wrong";
  return "";
}
#elif defined(__x86_64__)
std::string reason_against_tiles() { return "the compiler that built trilby knows no AMX"; }
#else
std::string reason_against_tiles() { return "the processor has no AMX-bf16"; }
#endif

// The tile unit is asked for once, and only on demand: not where TRILBY_CPU_ISA names another level.
const Kernels* tiles() {
#if defined(TRILBY_HAS_AMX)
  if (why_not_amx().empty()) return &amx::table;
#endif
  return nullptr;
}

const Kernels* named(const char* level) {
  if (const Kernels* found = vectors().named(level)) return found;
  return std::strcmp(level, "amx") == 0 ? tiles() : nullptr;
}

const Kernels* best() {
  if (const Kernels* found = tiles()) return found;
  const Kernels* last = vectors().levels[vectors().count - 1];
  return last == vectors().named("avx512bf16") && !multiplies_pairs_fast() ? vectors().named("avx512") : last;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen = [] {
    const char* wanted = std::getenv("TRILBY_CPU_ISA");
    const Kernels* forced = wanted ? named(wanted) : nullptr;
    return forced ? forced : best();
  }();
  return chosen;
}

}  // namespace

std::vector<const Kernels*> available_levels() {
  std::vector<const Kernels*> levels(vectors().levels, vectors().levels + vectors().count);
  if (const Kernels* found = tiles()) levels.push_back(found);
  return levels;
}

const std::string& why_not_amx() {
  static const std::string reason = reason_against_tiles();
  return reason;
}

// By the vendor, for a measurement at start would now and then be another. Zen 4 multiplies 32 pairs in the cycle of 16
// multiply-adds: torch.mm reaches 434 GFLOP/s in bf16 on two of its cores, 207 in float32. Intel's processors take two
// cycles: on a Xeon whose tile unit was out of reach bf16 reached 146 and float32 233.
bool multiplies_pairs_fast() {
#if defined(__x86_64__)
  return vectors().named("avx512bf16") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

bool use_level(const char* level) {
  const Kernels* found = named(level);
  if (found) active().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace trilby
