// The tile unit's first product, on a machine that says it has one: compared with sums that are exact in float32.
#include "level.h"
#include "tile_pack.h"

namespace trilby::TRILBY_LEVEL {

// 32 rows, 32 columns and 64 steps of small integers: every tile, both halves of every pair, sums from memory and anew.
bool tiles_are_right() {
  constexpr int64_t SIDE = 32, STEPS = 64;
  float left[SIDE * STEPS], right[STEPS * SIDE], sums[SIDE * SIDE];
  uint16_t rows[SIDE * STEPS], pairs[STEPS * SIDE];
  for (int64_t i = 0; i < SIDE * STEPS; i++) {
    left[i] = static_cast<float>(i * 7 % 29 - 14);
    right[i] = static_cast<float>(i * 5 % 31 - 15);
  }
  for (int64_t i = 0; i < SIDE * STEPS; i += LANES) BFloat16::store_vector(rows + i, load(left + i));
  for (int64_t k = 0; k < STEPS; k += 2) {
    for (int64_t c = 0; c < SIDE; c += LANES) {
      store_pairs(pairs + k * SIDE + 2 * c, load(right + k * SIDE + c), load(right + (k + 1) * SIDE + c));
    }
  }
  {
    const TilesInUse tiles;
    tile_product<Start::zero>(SIDE, SIDE, {rows, STEPS}, {pairs, 2 * SIDE}, sums, SIDE, STEPS);
    tile_product<Start::resume>(SIDE, SIDE, {rows, STEPS}, {pairs, 2 * SIDE}, sums, SIDE, STEPS);
  }
  for (int64_t r = 0; r < SIDE; r++) {
    for (int64_t c = 0; c < SIDE; c++) {
      float sum = 0.0f;
      for (int64_t k = 0; k < STEPS; k++) sum += left[r * STEPS + k] * right[k * SIDE + c];
      if (sums[r * SIDE + c] != 2.0f * sum) return false;
    }
  }
  return true;
}

}  // namespace trilby::TRILBY_LEVEL
