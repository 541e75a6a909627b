#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace trilby {

#if defined(__linux__)

namespace {

constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, of Linux 5.14: headers may be older

struct Pages {
  uintptr_t first, bytes;
};

Pages pages_of(const void* memory, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory), page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = begin / page * page;
  return {first, (begin + static_cast<uintptr_t>(bytes) - first + page - 1) / page * page};
}

}  // namespace

bool has_pages(const void* memory, int64_t bytes) {
  const Pages middle = pages_of(static_cast<const char*>(memory) + bytes / 2, 1);
  unsigned char present = 1;
  return mincore(reinterpret_cast<void*>(middle.first), middle.bytes, &present) != 0 || (present & 1);
}

void map_pages(void* memory, int64_t bytes) {
  const Pages pages = pages_of(memory, bytes);
  madvise(reinterpret_cast<void*>(pages.first), pages.bytes, POPULATE_WRITE);
}

#else

bool has_pages(const void*, int64_t) { return true; }
void map_pages(void*, int64_t) {}

#endif

}  // namespace trilby
