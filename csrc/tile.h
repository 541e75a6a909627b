// The tile unit (AMX): eight registers of 16 rows of 64 bytes, and one instruction that multiplies them.
//
// Written as assembly: the registers are named in the source, so that a compiler can neither spill nor rename them, and
// each statement is a barrier, so that none moves a load of a tile before the stores that made its memory (gcc's own
// intrinsics promise neither).
#pragma once

#include "tile_operand.h"

namespace trilby::TRILBY_LEVEL {

template <int TILE>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE) : "memory");
}

// Rows lie `stride` bytes apart.
template <int TILE>
static inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
static inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// SUM[r][c] += sum over k < 16 of A[r][2k] · B[k][2c] + A[r][2k + 1] · B[k][2c + 1]: bf16 numbers, added in float32.
template <int SUM, int A, int B>
static inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B) : "memory");
}

// Whoever holds one has all eight tiles, whole. While nothing is configured the kernel saves no 8 KiB of tiles when it
// switches threads: one to each task.
//
// Without a multiplication the unit falls asleep: measured on an Emerald Rapids, a product after 800 cycles of other
// work took 400 cycles, after 1200 cycles 1100. Loads, stores and zeros do not keep it awake.
class TilesInUse {
 public:
  TilesInUse() {
    alignas(64) static constexpr Configuration WHOLE = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {}, {16, 16, 16, 16, 16, 16, 16, 16}, {}};
    asm volatile("ldtilecfg %0" ::"m"(WHOLE) : "memory");
  }
  ~TilesInUse() { asm volatile("tilerelease" ::: "memory"); }
  // For what takes long between products. Nothing lies in the tiles then.
  static void keep_awake() { tile_multiply<0, 1, 2>(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_row[8], more_reserved[8];
    uint8_t rows[8], most_reserved[8];
  };
  static_assert(sizeof(Configuration) == 64);
};

}  // namespace trilby::TRILBY_LEVEL
