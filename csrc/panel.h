// What attention's forward and backward share: panels of queries in the lanes, blocks of keys, and the causal mask.
#pragma once

#include "pack.h"
#include "product.h"
#include "queue.h"

namespace trilby::TRILBY_LEVEL {

// Two vectors of queries. With 8 rows of keys in the register tile, 16 chains of multiply-adds hide their latency (8
// needed), and 10 loads feed them inside the two loads a cycle that the processor does. Measured on AVX-512, in percent
// of the multiply-add ceiling at T = 256 and 4096: 51 and 68; with 12 rows 53 and 68; with four vectors of queries and
// 6 rows 49 and 66. Narrow panels waste least on the diagonal.
constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;
// Keys in a block: its scores (64 x PANEL floats, 8 KiB on AVX-512) stay in the first-level cache. 96 and 128 measured
// the same.
constexpr int64_t BLOCK = 64;
// Panels that share a block of packed keys and values, so that packing costs each a fraction.
constexpr int64_t PANELS = 4;
constexpr float LOG2_E = 1.4426950408889634f;

// Panels dealt together: fewer where there would be too few tiles to keep every thread busy to the end. What a panel
// computes is the same either way.
static inline int64_t panels_in_tile(int64_t heads, int64_t query_length, int64_t threads) {
  int64_t panels = PANELS;
  while (panels > 1 && heads * ceiling(query_length, panels * PANEL) < 4 * threads) panels /= 2;
  return panels;
}

// Hands out pieces of the thread's scratch memory. First run counts only, second run gives addresses.
class Carver {
 public:
  float* take(int64_t floats) {
    float* piece = memory_ ? memory_ + taken_ : nullptr;
    taken_ += (floats + 15) / 16 * 16;  // a whole cache line each
    return piece;
  }
  void allocate() {
    memory_ = static_cast<float*>(thread_scratch(static_cast<size_t>(taken_) * sizeof(float)));
    taken_ = 0;
  }

 private:
  float* memory_ = nullptr;
  int64_t taken_ = 0;
};

// A block of keys and values as packed rows [count][D], [count][Dv].
struct KeyBlock {
  const float *keys, *values;
  int64_t first, count;
};

template <class Format>
static inline KeyBlock load_block(const AttentionShape& shape, const View& key, const View& value, int64_t batch,
                                  int64_t head, int64_t first, int64_t count, float* keys, float* values) {
  using Element = typename Format::Element;
  const Element* key_rows = row_of<Element>(key, batch, head, first);
  const Element* value_rows = row_of<Element>(value, batch, head, first);
  return {packed_rows<Format>(key_rows, key, count, shape.head_dim, keys),
          packed_rows<Format>(value_rows, value, count, shape.value_dim, values), first, count};
}

// How many keys of a block a panel sees, and whether some of its queries see fewer: with shift = first query - first
// key, query m of the panel sees key n of the block where n <= m + shift.
//
//     shift = 1, PANEL = 4:   m \ n  0 1 2 3 4 5 6 7
//                               0    1 1
//                               1    1 1 1
//                               2    1 1 1 1
//                               3    1 1 1 1 1          keys = 5, diagonal
struct Sight {
  int64_t keys, shift;
  bool diagonal;

  Sight(const AttentionRule& rule, int64_t first_query, const KeyBlock& block)
      : keys(block.count), shift(first_query - block.first), diagonal(false) {
    if (rule.window_right != 0) return;
    keys = smaller(keys, shift + PANEL);
    diagonal = keys - 1 > shift;
  }
};

// Whether `rows` [keys][columns] of a block may be multiplied by the zeros of hidden pairs: 0 · NaN is NaN, and what a
// mask hides must not be felt. Only keys that are hidden from some query are looked at.
static inline bool zero_hides(const Sight& sight, const float* rows, int64_t columns) {
  if (!sight.diagonal) return true;
  const int64_t seen_by_all = sight.shift < 0 ? 0 : sight.shift + 1;
  return all_finite(rows + seen_by_all * columns, (sight.keys - seen_by_all) * columns);
}

// Replaces the values [keys][PANEL] of hidden pairs.
static inline void hide(float* values, const Sight& sight, float replacement) {
  for (int64_t n = sight.shift > 0 ? sight.shift : 0; n < sight.keys; n++) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      float* row = values + n * PANEL + c * LANES;
      const Vector query = lane_numbers() + static_cast<float>(c * LANES);
      store(row, query >= static_cast<float>(n - sight.shift) ? load(row) : broadcast(replacement));
    }
  }
}

}  // namespace trilby::TRILBY_LEVEL
