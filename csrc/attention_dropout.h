// Dropout of a block of attention's probabilities, by position: nothing is stored, and the backward draws the same.
#pragma once

#include "attention_sight.h"
#include "random.h"

namespace trilby::TRILBY_LEVEL {

// The rows of one panel, as random numbers know them.
struct DropoutRows {
  RandomRows rows[PANEL_VECTORS];
  uint32_t high;

  void start(const Dropout& dropout, int64_t plane, int64_t first_row) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      const uint64_t row = static_cast<uint64_t>(first_row + c * LANES);
      rows[c] = random_rows({dropout.seed, static_cast<uint32_t>(plane)}, row);
    }
    high = static_cast<uint32_t>(static_cast<uint64_t>(first_row) >> 32);
  }
};

// Calls apply(row n of the block, vector c, lanes) for the keys that the vectors of a panel have part in, a multiple of
// RANDOM_COLUMNS or not: up to 7 rows past them are visited. A lane is nonzero where the pair is kept.
template <class Apply>
static inline void draw(const Dropout& dropout, const DropoutRows& rows, int64_t first_key, const Sight& sight,
                        const Apply& apply) {
  // A number is below the threshold where it is at most `largest`, both in the high half of a word.
  const Bits largest = Bits{} + ((dropout.threshold << 16) - 1);
  for (int c = 0; c < sight.vectors; c++) {
    for (int64_t n = 0; n < sight.ends[c]; n += RANDOM_COLUMNS) {
      Bits words[4];
      random_words(dropout.seed, rows.high, rows.rows[c], static_cast<uint32_t>((first_key + n) / RANDOM_COLUMNS),
                   words);
      for (int word = 0; word < 4; word++) {
        apply(n + 2 * word, c, words[word] << 16 > largest);
        apply(n + 2 * word + 1, c, words[word] > largest);
      }
    }
  }
}

// Drops probabilities [count][PANEL]. What is kept is not multiplied yet: that waits for the end of the sum.
static inline void drop(const Dropout& dropout, const DropoutRows& rows, int64_t first_key, const Sight& sight,
                        float* probabilities) {
  draw(dropout, rows, first_key, sight, [&](int64_t n, int c, auto kept) {
    float* at = probabilities + n * PANEL + c * LANES;
    store(at, kept ? load(at) : Vector{});
  });
}

// What dropout multiplies probabilities by, [count][PANEL].
static inline void dropout_factors(const Dropout& dropout, const DropoutRows& rows, int64_t first_key,
                                   const Sight& sight, float* factors) {
  draw(dropout, rows, first_key, sight, [&](int64_t n, int c, auto kept) {
    store(factors + n * PANEL + c * LANES, kept ? broadcast(dropout.scale) : Vector{});
  });
}

}  // namespace trilby::TRILBY_LEVEL
