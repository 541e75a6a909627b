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

struct ForwardProducts {
  static constexpr int64_t STEP = 8;      // what a panel sees of a block begins at multiples of so many keys
  static constexpr int64_t PART = BLOCK;  // keys whose scores are made at once
  static constexpr float SLACK = 0.0f;    // outputs shrink in the product, for nothing
  BlockLoader blocks;

  static int64_t output_rows(int64_t value_dim) { return value_dim; }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    queries_ = carver.take(PANELS * shape.head_dim * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  template <class Format>
  void pack_queries(int64_t p, const typename Format::Element* from, const View& view, int64_t count, int64_t head_dim,
                    float sign) const {
    pack_transposed<Format>(from, view, count, head_dim, sign, queries_ + p * head_dim * PANEL, PANEL);
  }

  // Sᵀ[n][m] of panel p.
  void scores(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight& sight, float* out) const {
    keys_by_panel(sight, block.keys, shape.head_dim, queries_ + p * shape.head_dim * PANEL, out);
  }

  KeepInPlace keep(int64_t, float* scores) const { return {scores}; }
  void take_probabilities(int64_t, const float*, int64_t) const {}

  static bool all_seen(Vector) { return false; }
  static bool all_within_slack(Vector) { return false; }
  static bool shrink_first(const float*) { return false; }
  static void shrink(const float*, int64_t, float*) {}

  // Oᵀ[d][m] = Oᵀ[d][m] · factors[m] + sum over n of V[n][d] · Pᵀ[n][m].
  void add_values(int64_t, const KeyBlock& block, const AttentionShape& shape, const Sight& sight,
                  const float* probabilities, const float* factors, float* outputs) const {
    const bool hidden = zero_hides(sight, block.values, block.count, shape.value_dim);
    panel_by_keys<Start::rescale>(sight, block.values, shape.value_dim, probabilities, outputs, factors,
                                  hidden ? nullptr : seen_pairs(sight, block.count, seen_));
  }

 private:
  float *queries_, *seen_;  // of PANELS panels [D][PANEL]; [BLOCK][PANEL]
};

// Probabilities and the scores' gradients stay floats, where scores and the probabilities' gradients were.
struct KeepBothInPlace {
  static constexpr int KEYS = 1, VECTORS = 1;  // at once
  float *probabilities, *grad_scores;
  void operator()(int64_t n, int c, const Vector (&its_probabilities)[1][1],
                  const Vector (&its_gradients)[1][1]) const {
    store(probabilities + n * PANEL + c * LANES, its_probabilities[0][0]);
    store(grad_scores + n * PANEL + c * LANES, its_gradients[0][0]);
  }
};

// Queries and their gradients of PANELS panels, both as columns [D][PANEL] and as rows [PANEL][D], in whole vectors.
struct BackwardProducts {
  static constexpr int64_t STEP = 8;      // what a panel sees of a block begins at multiples of so many keys
  static constexpr int64_t PART = BLOCK;  // keys whose scores are made at once
  static constexpr int64_t TOGETHER = 1;  // panels whose products with a block are summed at once
  BlockLoader blocks;

  static int64_t query_columns(int64_t head_dim) { return head_dim; }
  static int64_t key_rows(int64_t keys) { return keys; }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    for (Panel& mine : panels_) {
      mine.queries_transposed = carver.take(shape.head_dim * PANEL);
      mine.grads_transposed = carver.take(shape.value_dim * PANEL);
      mine.queries = carver.take(PANEL * whole_vectors(shape.head_dim));
      mine.grads = carver.take(PANEL * whole_vectors(shape.value_dim));
    }
    outputs_ = carver.take(PANEL * whole_vectors(shape.value_dim));
    output_transposed_ = carver.take(shape.value_dim * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  // Panel p, whose first row is given; delta[m] = sum over d of dO[m][d] · O[m][d], term by term in the order in which
  // the products sum dP: a query that sees one key, whose output is that key's value, then has a dS of exactly 0.
  template <class Format, class Element = typename Format::Element>
  void load_panel(int64_t p, const AttentionBackward& problem, const Element* query, const Element* grad,
                  const Element* output, int64_t count, float* delta) const {
    const int64_t D = problem.shape.head_dim, Dv = problem.shape.value_dim;
    const Panel& panel = panels_[p];
    pack_padded<Format>(query, problem.query, count, D, panel.queries);
    pack_padded<Format>(grad, problem.grad_output, count, Dv, panel.grads);
    pack_padded<Format>(output, problem.output, count, Dv, outputs_);
    transpose_padded(panel.queries, count, D, panel.queries_transposed);
    transpose_padded(panel.grads, count, Dv, panel.grads_transposed);
    transpose_padded(outputs_, count, Dv, output_transposed_);
    for (int m = 0; m < PANEL; m += LANES) {
      Vector sum = {};
      for (int64_t i = m; i < Dv * PANEL; i += PANEL) {
        sum += load(output_transposed_ + i) * load(panel.grads_transposed + i);
      }
      store(delta + m, sum);
    }
  }

  // Sᵀ[n][m].
  void scores(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight& sight, float* out) const {
    keys_by_panel(sight, block.keys, shape.head_dim, panels_[p].queries_transposed, out);
  }

  // dPᵀ[n][m].
  void grad_probabilities(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight& sight,
                          float* out) const {
    keys_by_panel(sight, block.values, shape.value_dim, panels_[p].grads_transposed, out);
  }

  KeepBothInPlace keep(int64_t, int64_t, float* probabilities, float* grad_scores) const {
    return {probabilities, grad_scores};
  }

  // dQᵀ[d][m] += sum over n of K[n][d] · dSᵀ[n][m].
  void add_to_queries(const KeyBlock& block, int64_t, const AttentionShape& shape, const Sight& sight,
                      const float* grad_scores, float* grad_queries) const {
    const bool hidden = zero_hides(sight, block.keys, block.count, shape.head_dim);
    panel_by_keys<Start::resume>(sight, block.keys, shape.head_dim, grad_scores, grad_queries, nullptr,
                                 hidden ? nullptr : seen_pairs(sight, block.count, seen_));
  }

  // Of the one panel's keys, whose gradients are given:
  // dV[n][d] += sum over m of Pᵀ[n][m] · dO[m][d], dK[n][d] += sum over m of dSᵀ[n][m] · Q[m][d].
  void add_to_keys(const Sequence& sequence, const KeyRange& block, const SeenKeys (&seen)[TOGETHER], int64_t,
                   const AttentionShape& shape, const float* probabilities, const float* grad_scores, float* grad_keys,
                   float* grad_values) const {
    if (seen[0].count == 0) return;
    const Panel& panel = panels_[seen[0].panel];
    const Sight sight(sequence, seen[0].first_query, seen[0]);
    const int64_t skipped = seen[0].first - block.first;
    const int64_t width = whole_vectors(shape.head_dim), value_width = whole_vectors(shape.value_dim);
    accumulate(grad_values + skipped * value_width, sight, probabilities, panel.grads, value_width);
    accumulate(grad_keys + skipped * width, sight, grad_scores, panel.queries, width);
  }

 private:
  struct Panel {
    float *queries_transposed, *grads_transposed, *queries, *grads;
  } panels_[PANELS];
  float *outputs_, *output_transposed_, *seen_;  // [PANEL][Dv], in whole vectors; [Dv][PANEL]; [BLOCK][PANEL]

  // `rows` rows of `columns` elements as floats, in whole vectors, with zeros after each and in the rest of a panel.
  template <class Format>
  static void pack_padded(const typename Format::Element* from, const View& view, int64_t rows, int64_t columns,
                          float* to) {
    const int64_t width = whole_vectors(columns);
    for (int64_t m = 0; m < PANEL; m++) {
      float* row = to + m * width;
      if (m < rows) {
        store(row + width - LANES, Vector{});
        unpack_row<Format>(from + m * view.row, view.column, columns, row);
      } else {
        for (int64_t d = 0; d < width; d += LANES) store(row + d, Vector{});
      }
    }
  }

  // Such rows as columns [columns][PANEL]. To copy rows first and transpose them in the cache asks for their lines one
  // after the other, all at once; the transposition itself waits for those of each block. Measured on a Zen 4, one
  // thread, T = 128, queries, gradients and outputs of a panel: 17,000 cycles instead of 28,000, the backward 1.07
  // times as fast, 1.05 at T = 256, from 1024 on as fast. Prefetching them instead gained nothing, nor did the copy in
  // the forward.
  static void transpose_padded(const float* rows, int64_t count, int64_t columns, float* to) {
    pack_transposed<Float32>(rows, {nullptr, 0, 0, whole_vectors(columns), 1}, count, columns, 1.0f, to, PANEL);
  }

  // gradient[n][d] += sum over m of weights[n][m] · rows[m][d].
  static void accumulate(float* gradient, const Sight& sight, const float* weights, const float* rows, int64_t width) {
    int64_t d = 0;
    for (; d + PANEL <= width; d += PANEL) accumulate<PANEL_VECTORS>(gradient + d, sight, weights, rows + d, width);
    if (PANEL_VECTORS > 2 && d + 2 * LANES <= width) {
      accumulate<2>(gradient + d, sight, weights, rows + d, width);
      d += 2 * LANES;
    }
    if (d < width) accumulate<1>(gradient + d, sight, weights, rows + d, width);
  }

  // Of so many vectors of columns.
  template <int VECTORS>
  static void accumulate(float* gradient, const Sight& sight, const float* weights, const float* rows, int64_t width) {
    down_the_stairs(sight, [&](int64_t c, int64_t first, int64_t end) __attribute__((always_inline)) {
      product<VECTORS, Start::resume>(end - first, {weights + first * PANEL + c * LANES, PANEL, 1},
                                      rows + c * LANES * width, width, gradient + first * width, width, nullptr,
                                      AllSteps{(sight.vectors - c) * LANES});
    });
  }
};

}  // namespace trilby::TRILBY_LEVEL
