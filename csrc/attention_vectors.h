// What attention multiplies, forward and backward, as vectors of floats: how queries, keys and values are packed, and
// the products of a panel and a block. attention_tiles.h is the same on the tile unit.
#pragma once

#include "attention_sight.h"
#include "product.h"

namespace trilby::TRILBY_LEVEL {

// `count` rows of key or value, packed: where they are, or in `to`.
template <class Format>
static inline const float* load_rows(const AttentionSequences& sequences, const Sequence& sequence, const View& view,
                                     int64_t head, int64_t first, int64_t count, int64_t columns, float* to) {
  using Element = typename Format::Element;
  const KeyRows all(sequences, sequence, first, count);
  if (all.count == count) {
    return packed_rows<Format>(row_of<const Element>(view, all.batch, head, all.row), view, count, columns, to);
  }
  for (int64_t done = 0; done < count;) {
    const KeyRows rows(sequences, sequence, first + done, count - done);
    copy_rows<Format>(row_of<const Element>(view, rows.batch, head, rows.row), view, rows.count, columns,
                      to + done * columns);
    done += rows.count;
  }
  return to;
}

// A panel's results [columns][PANEL], times `factors`, as rows.
template <class Format>
static inline void unpack_panel(const float* from, const float* factors, int64_t rows, int64_t columns,
                                typename Format::Element* to, int64_t stride) {
  unpack_transposed<Format>(from, PANEL, factors, rows, columns, to, stride);
}

// Keys and values as packed rows [count][D], [count][Dv].
struct KeyBlock : KeyRange {
  const float *keys, *values;

  KeyBlock part(const KeyRange& range, const AttentionShape& shape) const {
    const int64_t skipped = range.first - first;
    return {range, keys + skipped * shape.head_dim, values + skipped * shape.value_dim};
  }
};

// What a task holds while it multiplies: of vectors, nothing.
struct UnitInUse {
  UnitInUse() {}
  static void keep_awake() {}
};

// The blocks of keys and values of one task.
class BlockLoader {
 public:
  void place(Carver& carver, const AttentionShape& shape) {
    keys_ = carver.take(BLOCK * shape.head_dim);
    values_ = carver.take(BLOCK * shape.value_dim);
  }

  template <class Format, class Problem>
  KeyBlock load_block(const Problem& problem, const Sequence& sequence, int64_t head, int64_t first,
                      int64_t count) const {
    const AttentionSequences& sequences = problem.sequences;
    const AttentionShape& shape = problem.shape;
    return {{first, count},
            load_rows<Format>(sequences, sequence, problem.key, head, first, count, shape.head_dim, keys_),
            load_rows<Format>(sequences, sequence, problem.value, head, first, count, shape.value_dim, values_)};
  }

  // Without values.
  template <class Format, class Problem>
  KeyBlock load_keys(const Problem& problem, const Sequence& sequence, int64_t head, const KeyRange& range) const {
    return {range,
            load_rows<Format>({}, sequence, problem.key, head, range.first, range.count, problem.shape.head_dim, keys_),
            nullptr};
  }

 private:
  float *keys_, *values_;
};

// Calls visit(std::integral_constant<int, VECTORS>) with `vectors` of a panel: all, or what a step of its stairs
// leaves.
template <int VECTORS = PANEL_VECTORS, class Visit>
__attribute__((always_inline)) static inline void with_vectors(int64_t vectors, const Visit& visit) {
  if (vectors == VECTORS) return visit(std::integral_constant<int, VECTORS>{});
  if constexpr (VECTORS > 1 && Sight::STAIRS) with_vectors<VECTORS - 1>(vectors, visit);
}

// The stairs of a panel and a block, whose keys [first, end) the vectors of the panel from one on take part in, as
// visit(that one, first, end): on the diagonal several, elsewhere one. Measured on AVX-512, one thread, causal, D = 64,
// in turns with halves of a panel, and softmax and dropout of it all: forward 1.39 times as fast at T = 16, 1.24 at
// 32, 1.20 at 64, 1.12 at 128, 1.06 at 256; backward 1.23, 1.37, 1.21, 1.03 and 1.10; from 1024 on as fast.
template <class Visit>
__attribute__((always_inline)) static inline void down_the_stairs(const Sight& sight, const Visit& visit) {
  int64_t first = 0;
  for (int64_t c = 0; c < (Sight::STAIRS ? sight.vectors : 1); c++) {
    if (sight.ends[c] > first) visit(c, first, sight.ends[c]);
    first = sight.ends[c];
  }
}

// out[n][m] = sum over d of rows[n][d] · b[d][m] of keys n and a panel's columns m.
static inline void keys_by_panel(const Sight& sight, const float* rows, int64_t columns, const float* b, float* out) {
  down_the_stairs(sight, [&](int64_t c, int64_t first, int64_t end) __attribute__((always_inline)) {
    with_vectors(sight.vectors - c, [&](auto vectors) __attribute__((always_inline)) {
      product<vectors.value, Start::zero>(end - first, {rows + first * columns, columns, 1}, b + c * LANES, PANEL,
                                          out + first * PANEL + c * LANES, PANEL, nullptr, AllSteps{columns});
    });
  });
}

// out[d][m] (+)= sum over keys n of rows[n][d] · b[n][m], of a panel's columns m. With `seen`, pairs that are hidden
// take no part, whatever is in rows.
template <Start START>
static inline void panel_by_keys(const Sight& sight, const float* rows, int64_t columns, const float* b, float* out,
                                 const float* factors, const float* seen) {
  const Operand a = {rows, 1, columns};
  if (seen) {
    const SeenSteps steps = {sight.ends[PANEL_VECTORS - 1], seen};
    return product<PANEL_VECTORS, START>(columns, a, b, PANEL, out, PANEL, factors, steps);
  }
  const RisingSteps steps = {sight.ends};
  if constexpr (Sight::STAIRS) {
    if (sight.vectors == 2) return product<2, START>(columns, a, b, PANEL, out, PANEL, factors, steps);
    if (sight.vectors == 1) return product<1, START>(columns, a, b, PANEL, out, PANEL, factors, steps);
  }
  product<PANEL_VECTORS, START>(columns, a, b, PANEL, out, PANEL, factors, steps);
}

}  // namespace trilby::TRILBY_LEVEL
