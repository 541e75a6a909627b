// What attention's backward multiplies, as vectors of floats.
#pragma once

#include "attention_vectors.h"

namespace trilby::TRILBY_LEVEL {

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
    const Sight sight(sequence, seen[0].first_query, seen[0], {});
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
