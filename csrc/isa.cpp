#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace trilby {

namespace baseline { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

namespace {

struct Available {
  const Kernels* levels[4];
  int count = 0;

  // __builtin_cpu_supports asks both the processor (CPUID) and the kernel (XCR0: are the wide registers saved?).
  Available() {
    levels[count++] = &baseline::table;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      levels[count++] = &avx2::table;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")) {
        levels[count++] = &avx512::table;
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

const Available& available() {
  static const Available machine;
  return machine;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen = [] {
    const Available& machine = available();
    const char* wanted = std::getenv("TRILBY_CPU_ISA");
    const Kernels* forced = wanted ? machine.named(wanted) : nullptr;
    return forced ? forced : machine.levels[machine.count - 1];
  }();
  return chosen;
}

}  // namespace

const Kernels* const* available_levels(int* count) {
  *count = available().count;
  return available().levels;
}

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

bool use_level(const char* level) {
  const Kernels* named = available().named(level);
  if (named) active().store(named, std::memory_order_relaxed);
  return named != nullptr;
}

}  // namespace trilby
