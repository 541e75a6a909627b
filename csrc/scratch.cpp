#include "kernels.h"

#include <cstdlib>
#include <new>

namespace trilby {

namespace {

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Scratch mine;
  if (mine.bytes < bytes) {
    std::free(mine.memory);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    mine.memory = std::aligned_alloc(64, rounded);
    mine.bytes = mine.memory ? rounded : 0;
    if (!mine.memory) throw std::bad_alloc();
  }
  return mine.memory;
}

}  // namespace trilby
