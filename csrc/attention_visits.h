// Decoding: which queries share a key head, and in which order the keys of a split are visited.
#pragma once

#include "pair.h"
#include "panel.h"

namespace trilby::TRILBY_LEVEL {

// Keys in a split: enough that its partial results are 1 part in 500 of its traffic, few enough that 8 threads find
// work in 4096 keys of one head.
constexpr int64_t SPLIT = 512;
// Runs of adjacent keys that are read side by side: one stream of addresses a thread leaves a third of the bandwidth
// unused; see linear.cpp.
constexpr int STREAMS = 8;
// Visits ahead of the one at hand whose rows are asked for.
constexpr int64_t AHEAD = 2 * STREAMS;
constexpr int64_t LINE = 64;  // bytes that are fetched together

static inline int64_t whole_pairs(int64_t columns) { return ceiling(columns, PAIR) * PAIR; }

// The queries that read one key head of one sequence: row r is query r % T of query head first_head + r / T.
struct Group {
  Sequence sequence;
  int64_t key_head, first_head, rows;

  Group(const AttentionForward& problem, const Sequence& its, int64_t head)
      : sequence(its), key_head(head), first_head(0), rows(0) {
    const int64_t heads = problem.shape.query_heads / problem.shape.key_heads;
    first_head = head * heads;
    rows = heads * its.queries;
  }
  int64_t query(int64_t r) const { return r % sequence.queries; }
  int64_t head(int64_t r) const { return first_head + r / sequence.queries; }
};

// Keys of one split that any query of the group sees: none, if the first is not below the end.
struct Keys {
  int64_t first, end;

  Keys(const Sequence& sequence, int64_t split)
      : first(greater(split * SPLIT, sequence.first_seen(0))),
        end(smaller((split + 1) * SPLIT, sequence.end_seen(sequence.queries))) {}
  int64_t count() const { return greater(0, end - first); }
};

// What a thread works in, for R queries.
template <class Format>
struct Workspace {
  using Element = typename Format::Element;
  float *queries, *scores, *numbers;  // [R][D], [R][SPLIT], [SPLIT]: which key of the split each visit is to, as floats
  const Element **keys, **values;     // rows in the order of the visits, AHEAD of them past the last

  static int64_t bytes(const AttentionShape& shape, int64_t R) {
    const int64_t floats = R * whole_pairs(shape.head_dim) + (R + 1) * SPLIT;
    const int64_t pointers = 2 * SPLIT + AHEAD;
    return ceiling(floats * 4 + pointers * static_cast<int64_t>(sizeof(void*)), LINE) * LINE;
  }

  Workspace(void* memory, const AttentionShape& shape, int64_t R)
      : queries(static_cast<float*>(memory)),
        scores(queries + R * whole_pairs(shape.head_dim)),
        numbers(scores + R * SPLIT),
        keys(reinterpret_cast<const Element**>(numbers + SPLIT)),
        values(nullptr) {}
};

// In which order `count` keys are visited: STREAMS runs of `run` adjacent ones side by side, then those that are left.
// With 7 keys and 3 streams, where the numbers are those of the visits:    0 3 | 1 4 | 2 5 | 6
struct Order {
  int64_t count, run, side_by_side;  // keys; in a run; in all runs

  explicit Order(int64_t keys) : count(keys), run(keys / STREAMS), side_by_side(run * STREAMS) {}
};

// Rows of adjacent keys from `key` on to to[0], to[step], to[2 · step], …: wherever blocks put them.
template <class Element>
static void put_rows(const AttentionForward& problem, const Group& group, const View& view, int64_t key, int64_t count,
                     int64_t step, const Element** to) {
  while (count > 0) {
    const KeyRows found(problem.sequences, group.sequence, key, count);
    const Element* row = row_of<const Element>(view, found.batch, group.key_head, found.row);
    for (int64_t i = 0; i < found.count; i++, to += step) *to = row + i * view.row;
    key += found.count;
    count -= found.count;
  }
}

template <class Format>
static void find_rows(const AttentionForward& problem, const Group& group, const View& view, int64_t first,
                      const Order& order, const typename Format::Element** rows) {
  if (problem.sequences.block_table) {
    for (int64_t s = 0; s < STREAMS; s++) {
      put_rows(problem, group, view, first + s * order.run, order.run, STREAMS, rows + s);
    }
  } else if (order.run > 0) {
    put_rows(problem, group, view, first, STREAMS, 1, rows);
    for (int s = 0; s < STREAMS; s++) rows[s] += s * (order.run - 1) * view.row;
    for (int64_t visit = STREAMS; visit < order.side_by_side; visit++) rows[visit] = rows[visit - STREAMS] + view.row;
  }
  put_rows(problem, group, view, first + order.side_by_side, order.count - order.side_by_side, 1,
           rows + order.side_by_side);
}

// Whether it matters which key is visited when.
static inline bool asks_for_numbers(const AttentionRule& rule, const Sequence& sequence) {
  return rule.alibi_slopes || rule.mask_kind != Mask::none || sequence.queries > 1;
}

// Puts the keys [first, first + count) in the order in which they are visited, and says which they are. Visits past the
// last, up to a whole vector, and what is fetched ahead, repeat a row that exists.
template <class Format>
static void plan_visits(const AttentionForward& problem, const Group& group, int64_t first, int64_t count,
                        Workspace<Format>& work) {
  const Order order(count);
  const int64_t padded = ceiling(count, LANES) * LANES;
  work.values = work.keys + padded;
  find_rows<Format>(problem, group, problem.key, first, order, work.keys);
  find_rows<Format>(problem, group, problem.value, first, order, work.values);
  for (int64_t past = count; past < padded; past++) work.keys[past] = work.keys[count - 1];
  for (int64_t past = 0; past < AHEAD; past++) work.values[count + past] = work.values[count - 1];
  if (!asks_for_numbers(problem.rule, group.sequence)) return;
  for (int64_t i = 0; i < order.run; i++) {
    for (int64_t s = 0; s < STREAMS; s++) work.numbers[i * STREAMS + s] = static_cast<float>(s * order.run + i);
  }
  for (int64_t visit = order.side_by_side; visit < count; visit++) work.numbers[visit] = static_cast<float>(visit);
}

}  // namespace trilby::TRILBY_LEVEL
