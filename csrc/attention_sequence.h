// Where the sequences of one call of attention lie, and how their rows are dealt out in tiles.
#pragma once

#include "queue.h"
#include "vector.h"

namespace trilby::TRILBY_LEVEL {

static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Farther than any key is from any query: the bound of a window that has none.
constexpr int64_t FAR = int64_t{1} << 40;

// One sequence. Queries and keys are numbered within it; its key j may be any row of any page.
struct Sequence {
  int64_t number, batch;         // n; the index into the batch of query
  int64_t first_query, queries;  // rows of query; none, where another kernel computes them
  int64_t first_key, key_rows;   // rows of key, where it is not paged
  int64_t keys;                  // of those rows, how many exist
  int64_t offset;                // key i + offset is the one at query i's own position
  int64_t before, after;         // query i sees the keys i - before … i + after

  Sequence(const AttentionShape& shape, const AttentionSequences& sequences, const AttentionRule& rule, int64_t n)
      : number(n),
        batch(sequences.query_starts ? 0 : n),
        first_query(sequences.query_starts ? sequences.query_starts[n] : 0),
        queries(sequences.queries_of(n, shape.query_length)),
        first_key(sequences.key_starts ? sequences.key_starts[n] : 0),
        key_rows(sequences.key_starts ? sequences.key_starts[n + 1] - first_key : shape.key_length),
        keys(sequences.key_lengths ? greater(0, smaller(sequences.key_lengths[n], key_rows)) : key_rows),
        offset(rule.lower_right ? keys - queries : 0),
        before(rule.window_left < 0 ? FAR : rule.window_left - offset),
        after(rule.window_right < 0 ? FAR : rule.window_right + offset) {
    if (queries < sequences.fewest_queries || queries > sequences.most_queries) queries = 0;
  }

  // The keys [first_seen, end_seen) that any of the queries [first, end) sees, if there are any.
  int64_t first_seen(int64_t first) const { return greater(0, first - before); }
  int64_t end_seen(int64_t end) const { return smaller(keys, end + after); }
  // The queries [first_seeing, end_seeing) that see any of the keys [first, end).
  int64_t first_seeing(int64_t first) const { return greater(0, first - after); }
  int64_t end_seeing(int64_t end) const { return smaller(queries, end + before); }
};

// Every sequence cut into tiles of `size` rows. Of packed sequences, whose lengths only their starts tell, number n has
// the numbers from (starts[n] - starts[0]) / size + n on: enough for it, and one too many at most. `starts` is null
// where all have `rows` rows.
struct Tiles {
  const int32_t* starts;
  int64_t sequences, rows, size;

  struct Tile {
    int64_t sequence, first;  // `first` may lie past the sequence's end: then there is nothing to do
  };

  int64_t count() const { return starts ? first_of(sequences) : sequences * ceiling(rows, size); }

  // Tiles of equal sequences take turns, so that the last of all have the highest numbers.
  Tile operator[](int64_t number) const {
    if (!starts) return {number % sequences, number / sequences * size};
    int64_t low = 0, high = sequences;  // the sequence is in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_of(middle) <= number ? low : high) = middle;
    }
    return {low, (number - first_of(low)) * size};
  }

 private:
  int64_t first_of(int64_t n) const { return (starts[n] - starts[0]) / size + n; }
};

// Clears what no sequence owns of the `rows` rows of a packed tensor: calls clear(first, end) for both ends.
template <class Clear>
static inline void clear_unowned(const int32_t* starts, int64_t sequences, int64_t rows, const Clear& clear) {
  if (!starts) return;
  if (starts[0] > 0) clear(int64_t{0}, int64_t{starts[0]});
  if (starts[sequences] < rows) clear(int64_t{starts[sequences]}, rows);
}

}  // namespace trilby::TRILBY_LEVEL
