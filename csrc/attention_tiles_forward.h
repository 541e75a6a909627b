// What attention's forward multiplies in bf16, on the tile unit or by vectors of pairs.
#pragma once

#include "attention_tiles.h"

namespace trilby::TRILBY_LEVEL {

// Floats [count][PANEL], of which those past `count` are not read, as a right operand whose steps are keys.
static inline void narrow_pairs(const float* from, int64_t count, uint16_t* to) {
  for (int64_t n = 0; n < count; n += 2) {
    for (int64_t m = 0; m < PANEL; m += LANES) {
      const Vector odd = n + 1 < count ? load(from + (n + 1) * PANEL + m) : Vector{};
      store_pairs(to + n * PANEL + 2 * m, load(from + n * PANEL + m), odd);
    }
  }
}

// Probabilities go where the products read them, rounded.
struct KeepInPairs {
  static constexpr int KEYS = 2;  // at once
  static constexpr bool IN_PLACE = false;
  uint16_t* pairs;
  void operator()(int64_t n, int c, const Vector (&results)[KEYS]) const {
    store_pairs(pairs + n * PANEL + 2 * c * LANES, results[0], results[1]);
  }
};

struct ForwardProducts {
  static constexpr int64_t STEP = TILE_NUMBERS;  // what a panel sees of a block begins at multiples of so many keys
  // Keys whose scores are made at once, and read while they lie in the first-level cache: a tile's store takes 18
  // cycles there, 58 where its lines are in the second. Measured on one core of an Emerald Rapids, D = 64: 1.07 times
  // as fast as whole blocks at T = 128, 1.08 at 1024; parts of 32 keys 0.98, of 128 0.97, and of 64, where the tile
  // unit falls asleep over their softmax, 0.9.
  static constexpr int64_t PART = 64;
  // Probabilities may be so much larger than 1, as a power of 2, before outputs shrink for a new maximum: they are as
  // exact as smaller ones, and outputs are left alone (which measured 1.03 times as fast).
  static constexpr int SLACK = 8;
  BlockLoader<Transposed::values> blocks;

  static int64_t output_rows(int64_t value_dim) { return whole_tiles(value_dim); }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    width_ = whole_steps(shape.head_dim);
    rows_ = carver.take<uint16_t>(PANEL * width_);
    queries_ = carver.take<uint16_t>(PANELS * width_ * PANEL);
    probabilities_ = carver.take<uint16_t>(BLOCK * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  template <class Format>
  void pack_queries(int64_t p, const uint16_t* from, const View& view, int64_t count, int64_t head_dim,
                    float sign) const {
    pair_columns(panel_rows(from, view, count, head_dim, sign, rows_, width_), width_, PANEL,
                 queries_ + p * width_ * PANEL);
  }

  // Sᵀ[n][m] of panel p.
  void scores(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight&, float* out) const {
    tile_product<Start::zero>(block.count, PANEL, block.keys.rows, {queries_ + p * width_ * PANEL, 2 * PANEL}, out,
                              PANEL, shape.head_dim);
  }

  KeepInPairs keep(int64_t skipped, float*) const { return {probabilities_ + skipped * PANEL}; }
  void take_probabilities(int64_t skipped, const float* from, int64_t count) const {
    narrow_pairs(from, count, probabilities_ + skipped * PANEL);
  }

  // Whether a maximum has risen so far that outputs shrink, before these probabilities' values are added.
  static bool shrink_first(const float* factors) {
    bool some = false;
    for (int64_t m = 0; m < PANEL; m += LANES) some |= any(load(factors + m) != 1.0f);
    return some;
  }

  // Oᵀ[d][m] = Oᵀ[d][m] · factors[m].
  static void shrink(const float* factors, int64_t value_dim, float* outputs) {
    for (int64_t m = 0; m < PANEL; m += LANES) {
      const Vector factor = load(factors + m);
      for (int64_t i = m; i < value_dim * PANEL; i += PANEL) store(outputs + i, load(outputs + i) * factor);
    }
  }

  // Oᵀ[d][m] += sum over n of V[n][d] · Pᵀ[n][m], of keys from number `skipped` of the block on; `first`: Oᵀ is 0.
  void add_values(int64_t skipped, const KeyBlock& block, const AttentionShape& shape, const Sight& sight, const float*,
                  const float*, bool first, float* outputs) const {
    uint16_t* const probabilities = probabilities_ + skipped * PANEL;
    fill_pairs(block.count, probabilities);
    const TileOperand pairs = {probabilities, 2 * PANEL};
    if (first) {
      tile_product<Start::zero>(shape.value_dim, PANEL, block.values.transposed, pairs, outputs, PANEL, block.count);
    } else {
      tile_product<Start::resume>(shape.value_dim, PANEL, block.values.transposed, pairs, outputs, PANEL, block.count);
    }
    if (!block.values.finite) {
      add_spoiled(block.values.rows, block.count, shape.value_dim, probabilities, seen_pairs(sight, block.count, seen_),
                  outputs);
    }
  }

 private:
  int64_t width_;              // of a query, in whole steps
  uint16_t *rows_, *queries_;  // [PANEL][width]; of PANELS panels, in pairs [width / 2][PANEL]
  uint16_t* probabilities_;    // in pairs [BLOCK / 2][PANEL]
  float* seen_;                // [BLOCK][PANEL]
};

}  // namespace trilby::TRILBY_LEVEL
