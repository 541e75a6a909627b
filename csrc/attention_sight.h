// Which pairs of a panel of queries and a block of keys see each other: by the bounds of their sequence and the window
// around each query, and by a mask.
#pragma once

#include "panel.h"

namespace trilby::TRILBY_LEVEL {

// A mask's bytes as what is added to a score.
struct Boolean {
  using Element = uint8_t;
  static Vector load_vector(const uint8_t* from) {
    return widened(reinterpret_cast<const int8_t*>(from)) != 0 ? Vector{} : broadcast(-INFINITE);
  }
};

// What a mask says of a panel and a block: numbers to add, [keys][PANEL].
struct MaskBlock {
  const float* added = nullptr;  // null: there is no mask
  bool hides_some = false, hides_all = false;

  // Of the keys from number `skipped` of the block on.
  MaskBlock part(int64_t skipped) const {
    return added ? MaskBlock{added + skipped * PANEL, hides_some, hides_all} : MaskBlock{};
  }
};

template <class Format>
static inline void pack_mask(const View& mask, int64_t batch, int64_t head, int64_t first_query, int64_t queries,
                             int64_t first_key, int64_t keys, float* to) {
  using Element = typename Format::Element;
  const Element* from = row_of<const Element>(mask, batch, head, first_query) + first_key * mask.column;
  if (mask.row == 0) {  // one row for all queries: 3 instructions instead of 6 for LANES pairs
    float numbers[BLOCK];
    unpack_row<Format>(from, mask.column, keys, numbers);
    for (int64_t i = 0; i < keys * PANEL; i += LANES) store(to + i, broadcast(numbers[i / PANEL]));
    return;
  }
  pack_transposed<Format>(from, mask, queries, keys, 1.0f, to, PANEL);
}

// The smallest number tells whether any pair is hidden, the bits that differ from those of -inf whether any is seen.
static inline MaskBlock load_mask(const AttentionRule& rule, const Sequence& sequence, int64_t head,
                                  int64_t first_query, int64_t queries, int64_t first_key, int64_t keys, float* to) {
  const View& mask = rule.mask;
  const int64_t batch = sequence.number;
  switch (rule.mask_kind) {
    case Mask::none: return {};
    case Mask::boolean: pack_mask<Boolean>(mask, batch, head, first_query, queries, first_key, keys, to); break;
    case Mask::float32: pack_mask<Float32>(mask, batch, head, first_query, queries, first_key, keys, to); break;
    case Mask::bfloat16: pack_mask<BFloat16>(mask, batch, head, first_query, queries, first_key, keys, to); break;
    case Mask::float16: pack_mask<Float16>(mask, batch, head, first_query, queries, first_key, keys, to); break;
  }
  Vector smallest = {};
  Bits differing = {};
  for (int64_t i = 0; i < keys * PANEL; i += LANES) {
    const Vector numbers = load(to + i);
    smallest = numbers < smallest ? numbers : smallest;
    differing |= (Bits)numbers ^ (Bits)broadcast(-INFINITE);
  }
  return {to, any(smallest == -INFINITE), !any((Integers)differing)};
}

// Query m of the panel sees key n of the block where m + shift - before <= n <= m + shift + after, with shift = number
// of the first query - number of the first key, and where no mask hides it.
//
//     shift = 1, before = 2, after = 0, PANEL = 4:    m \ n  0 1 2 3 4
//                                                       0    1 1
//                                                       1    1 1 1
//                                                       2      1 1 1       keys [0, 2) are hidden from the last query,
//                                                       3        1 1 1     keys [2, 5) from the first
//
// The vectors of a wide panel go down the diagonal by stairs. Vector c has no part in the keys from ends[c] on, which
// all of its queries are hidden from: nothing is multiplied there, nothing written, and nothing may be read. A narrow
// panel hides too little for that, and tiles multiply two vectors at once.
struct Sight {
  static constexpr bool STAIRS = PANEL_VECTORS > 2;
  int64_t shift, before, after;
  int64_t past, future;         // keys [0, past) are hidden from the last query, [future, count) from the first
  int64_t vectors;              // that take part: see vectors_of
  int64_t ends[PANEL_VECTORS];  // ascending
  MaskBlock mask;

  Sight(const Sequence& sequence, int64_t first_query, const KeyRange& block, const MaskBlock& its_mask)
      : shift(first_query - block.first),
        before(sequence.before),
        after(sequence.after),
        past(greater(0, smaller(block.count, shift + PANEL - 1 - before))),
        future(greater(0, smaller(block.count, end_seen(0)))),
        vectors(vectors_of(sequence.queries - first_query)),
        mask(its_mask) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      ends[c] = STAIRS ? greater(0, smaller(block.count, end_seen((c + 1) * LANES - 1))) : block.count;
    }
  }

  // Vectors of a panel that compute `queries` queries. A sequence's last queries are often few: whole panels took 1.4
  // times as long at T = 16 and 32. Three would be a fourth variant of every product, for little.
  static int64_t vectors_of(int64_t queries) {
    if (!STAIRS || queries > 2 * LANES) return PANEL_VECTORS;
    return queries > LANES ? 2 : 1;
  }

  // Keys from this one on are hidden from the queries [0, query].
  int64_t end_seen(int64_t query) const { return query + shift + after + 1; }

  bool hides(const KeyRange& block) const { return past > 0 || future < block.count || mask.hides_some; }
};

// The part of a range of keys that the queries [first, end) see any of. It begins a multiple of `step` after the range,
// itself one of eight, as random numbers come.
static inline KeyRange seen_part(const KeyRange& range, const Sequence& sequence, int64_t first, int64_t end,
                                 int64_t step) {
  const int64_t begin = greater(0, sequence.first_seen(first) - range.first) / step * step;
  return {range.first + begin, smaller(range.count, sequence.end_seen(end) - range.first) - begin};
}

// Replaces the values [count][PANEL] of hidden pairs, wherever a vector of the panel has part.
static inline void hide(float* values, const Sight& sight, float replacement) {
  for (int c = 0; c < sight.vectors; c++) {
    const Vector query = lane_numbers() + static_cast<float>(c * LANES);
    const int64_t end = sight.ends[c];
    float* column = values + c * LANES;
    for (int64_t n = 0; n < smaller(sight.past, end); n++) {
      const float last = static_cast<float>(n - sight.shift + sight.before);
      store(column + n * PANEL, query <= last ? load(column + n * PANEL) : broadcast(replacement));
    }
    for (int64_t n = greater(0, sight.end_seen(c * LANES)); n < end; n++) {
      const float first = static_cast<float>(n - sight.shift - sight.after);
      store(column + n * PANEL, query >= first ? load(column + n * PANEL) : broadcast(replacement));
    }
    for (int64_t n = 0; sight.mask.hides_some && n < end; n++) {
      const Vector added = load(sight.mask.added + n * PANEL + c * LANES);
      store(column + n * PANEL, added == -INFINITE ? broadcast(replacement) : load(column + n * PANEL));
    }
  }
}

// Whether `rows` [count][columns] of a block may be multiplied by the zeros of hidden pairs: 0 · NaN is NaN, and what
// is hidden must not be felt. Only keys that are hidden from some query are looked at.
static inline bool zero_hides(const Sight& sight, const float* rows, int64_t count, int64_t columns) {
  if (sight.mask.hides_some) return all_finite(rows, count * columns);
  return all_finite(rows, sight.past * columns) &&
         all_finite(rows + sight.future * columns, (count - sight.future) * columns);
}

// 1 where a pair is seen, else 0, [count][PANEL].
static inline const float* seen_pairs(const Sight& sight, int64_t count, float* to) {
  for (int64_t i = 0; i < count * PANEL; i += LANES) {
    const int64_t c = i % PANEL / LANES;
    store(to + i, broadcast(c < sight.vectors && i / PANEL < sight.ends[c] ? 1.0f : 0.0f));
  }
  hide(to, sight, 0.0f);
  return to;
}

}  // namespace trilby::TRILBY_LEVEL
