// What attention's forward and backward share: panels of queries in the lanes, and blocks of keys.
#pragma once

#include "attention_sequence.h"
#include "pack.h"

namespace trilby::TRILBY_LEVEL {

// Vectors of queries: with 6 rows of keys in the register tile, 24 chains of multiply-adds hide their latency (8
// needed), and 10 loads feed them inside the two loads a cycle that the processor does. Measured on AVX-512 against two
// vectors and 8 rows, one thread, in turns: forward 1.04 times as fast at T = 256, 1.09 at 1024, 1.16 at 4096, 1.09
// with D = 128; three vectors and 8 rows 0.86 to 1.10. Short sequences take fewer vectors of a panel: see Sight. In
// bf16 two, since the diagonal hides least of a narrow panel. By vectors of pairs on a Zen 4, one thread, four measured
// 0.9 of the speed at T = 256, 0.95 at 1024, 0.98 at 4096; on the tile unit it was not measured: its products take
// tiles two by two whatever a panel's width.
#if defined(__AVX512BF16__)
constexpr int PANEL_VECTORS = 2;
#else
constexpr int PANEL_VECTORS = LANES == 16 ? 4 : 2;
#endif
constexpr int PANEL = PANEL_VECTORS * LANES;
// Keys in a block: its scores (64 x PANEL floats, 16 KiB on AVX-512) stay in the first-level cache. 48 and 96 measured
// 0.98. On the tile unit products are so fast that what counts is how often a panel's sums come and go: measured there
// on one core of an Emerald Rapids, D = 64, of 256 keys the forward is 1.04 times as fast as of 128, the backward 1.07
// times, and both as fast as of 512. By vectors of pairs 64, 128 and 256 measured within 3 % of one another.
//
// Panels that share a block of packed keys and values, so that packing costs each a fraction: those of 256 queries. On
// AVX2, whose panels are narrow, 64 queries packed for 11 % of the time; 256 measured 1.05 to 1.15 times as fast from
// T = 1024 on, forward and backward, and the same below. On the tile unit 512: of 128 a third of the forward's time
// was packing, and 512 measured 1.1 to 1.2 times as fast; by vectors of pairs 1.03 to 1.09 times as fast as 256.
#if defined(__AMX_BF16__)
constexpr int64_t BLOCK = 256, PANELS = 512 / PANEL;
#elif defined(__AVX512BF16__)
constexpr int64_t BLOCK = 128, PANELS = 512 / PANEL;
#else
constexpr int64_t BLOCK = 64, PANELS = 256 / PANEL;
#endif
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
  template <class Number = float>
  Number* take(int64_t numbers) {
    Number* piece = memory_ ? reinterpret_cast<Number*>(memory_ + taken_) : nullptr;
    taken_ += ceiling(numbers * static_cast<int64_t>(sizeof(Number)), 64) * 64;  // whole cache lines
    return piece;
  }
  void allocate() {
    memory_ = static_cast<char*>(thread_scratch(static_cast<size_t>(taken_)));
    taken_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t taken_ = 0;
};

// Has `place` take its pieces, once the thread has as much memory as they come to.
template <class Place>
static inline void carve(const Place& place) {
  Carver carver;
  place(carver);
  carver.allocate();
  place(carver);
}

// Where a pass over scores [BLOCK][PANEL] leaves what becomes of them: in their place.
struct KeepInPlace {
  static constexpr int KEYS = 1;  // at once
  static constexpr bool IN_PLACE = true;
  float* scores;
  void operator()(int64_t n, int c, const Vector (&results)[KEYS]) const {
    store(scores + n * PANEL + c * LANES, results[0]);
  }
};

// The keys first … first + count - 1 of a sequence.
struct KeyRange {
  int64_t first, count;
};

// The keys of a block that panel number `panel` sees any of: none, where there are none.
struct SeenKeys : KeyRange {
  int64_t panel, first_query;
};

// Rows of key (and of value) that hold the keys from `first` on, one after the other, `most` of them at most.
struct KeyRows {
  int64_t batch, row, count;

  KeyRows(const AttentionSequences& sequences, const Sequence& sequence, int64_t first, int64_t most)
      : batch(sequence.batch), row(sequence.first_key + first), count(most) {
    if (!sequences.block_table) return;
    batch = sequences.block_table[sequence.number * sequences.pages + first / sequences.page_size];
    row = first % sequences.page_size;
    count = smaller(count, sequences.page_size - row);
  }
};

}  // namespace trilby::TRILBY_LEVEL
