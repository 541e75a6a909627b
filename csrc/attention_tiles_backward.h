// What attention's backward multiplies in bf16, on the tile unit or by vectors of pairs.
#pragma once

#include "attention_tiles.h"

namespace trilby::TRILBY_LEVEL {

// Probabilities and the scores' gradients as products read them, rounded: by rows, dSᵀ in pairs, too.
struct KeepRounded {
  static constexpr int KEYS = 2, VECTORS = 2;  // at once
  static_assert(PANEL == VECTORS * LANES);
  uint16_t *probabilities, *grad_scores, *grad_score_pairs;  // [keys][row]; in pairs [keys / 2][PANEL]
  int64_t row;

  void operator()(int64_t n, int, const Vector (&its_probabilities)[2][2], const Vector (&its_gradients)[2][2]) const {
    for (int key = 0; key < 2; key++) {
      store_narrowed(probabilities + (n + key) * row, its_probabilities[key]);
      store_narrowed(grad_scores + (n + key) * row, its_gradients[key]);
    }
    for (int c = 0; c < 2; c++) {
      store_pairs(grad_score_pairs + n * PANEL + 2 * c * LANES, its_gradients[0][c], its_gradients[1][c]);
    }
  }

 private:
  static void store_narrowed(uint16_t* to, const Vector (&columns)[2]) {
    const Numbers numbers = narrowed(columns[0], columns[1]);
    __builtin_memcpy(to, &numbers, sizeof numbers);
  }
};

// Queries and their gradients of PANELS panels, as right operands: by columns for the scores, by rows for the keys'
// gradients. Probabilities and the scores' gradients of a block, rounded: by rows as left operands, those of panels
// that are summed together side by side; dSᵀ as a right one, too.
struct BackwardProducts {
  static constexpr int64_t STEP = TILE_NUMBERS;  // what a panel sees of a block begins at multiples of so many keys
  // Keys whose scores are made at once, and read while they lie in the first-level cache: a tile's store takes 18
  // cycles there, 58 where its lines are in the second. Of 64 the backward measured 0.92 of this speed, since the tile
  // unit falls asleep over their softmax (awake: 0.98), of whole blocks, where it sleeps less often, 0.95.
  static constexpr int64_t PART = TILE_NUMBERS;
  // Panels whose products with a block are summed at once, so that the sums of dK and dV come and go a quarter as
  // often: measured at T = 1024, D = 64, without a mask, in cycles for 16 scores: 1 panel 66, 2 58, 4 54, 8 54.
  static constexpr int64_t TOGETHER = 4;
  BlockLoader<Transposed::keys> blocks;

  static int64_t query_columns(int64_t head_dim) { return whole_tiles(head_dim); }
  static int64_t key_rows(int64_t keys) { return whole_tiles(keys); }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    width_ = whole_steps(shape.head_dim);
    value_width_ = whole_steps(shape.value_dim);
    queries_by_columns_ = carver.take<uint16_t>(PANELS * PANEL * width_);
    grads_by_columns_ = carver.take<uint16_t>(PANELS * PANEL * value_width_);
    queries_by_rows_ = carver.take<uint16_t>(PANELS * PANEL * width_);
    grads_by_rows_ = carver.take<uint16_t>(PANELS * PANEL * value_width_);
    rows_ = carver.take<uint16_t>(PANEL * greater(width_, value_width_));
    products_ = carver.take(TILE_ROWS * TILE_ROWS);
    probabilities_ = carver.take<uint16_t>(BLOCK * ROW);
    grad_scores_ = carver.take<uint16_t>(BLOCK * ROW);
    grad_score_pairs_ = carver.take<uint16_t>(BLOCK * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  // Panel p, whose first row is given; delta[m] = sum over d of dO[m][d] · O[m][d], the diagonal of a product by tiles,
  // as dP is one: a query that sees one key, whose output is that key's value, then has a dS of exactly 0.
  template <class Format>
  void load_panel(int64_t p, const AttentionBackward& problem, const uint16_t* query, const uint16_t* grad,
                  const uint16_t* output, int64_t count, float* delta) const {
    const TileOperand queries = panel_rows(query, problem.query, count, problem.shape.head_dim, 1.0f, rows_, width_);
    pair_columns(queries, width_, PANEL, queries_by_columns_ + p * PANEL * width_);
    pair_rows(queries, width_, PANEL, queries_by_rows_ + p * PANEL * width_);
    const TileOperand grads =
        panel_rows(grad, problem.grad_output, count, problem.shape.value_dim, 1.0f, rows_, value_width_);
    uint16_t* const by_columns = grads_by_columns_ + p * PANEL * value_width_;
    pair_columns(grads, value_width_, PANEL, by_columns);
    pair_rows(grads, value_width_, PANEL, grads_by_rows_ + p * PANEL * value_width_);
    const TileOperand outputs =
        panel_rows(output, problem.output, count, problem.shape.value_dim, 1.0f, rows_, value_width_);
    for (int64_t m = 0; m < PANEL; m += TILE_ROWS) {
      tile_product<Start::zero>(TILE_ROWS, TILE_ROWS, {outputs.data + m * outputs.row, outputs.row},
                                {by_columns + 2 * m, 2 * PANEL}, products_, TILE_ROWS, value_width_);
      for (int64_t i = 0; i < TILE_ROWS; i++) delta[m + i] = products_[i * TILE_ROWS + i];
    }
  }

  // Sᵀ[n][m].
  void scores(int64_t p, const KeyBlock& block, const AttentionShape&, const Sight&, float* out) const {
    tile_product<Start::zero>(block.count, PANEL, block.keys.rows,
                              {queries_by_columns_ + p * PANEL * width_, 2 * PANEL}, out, PANEL, width_);
  }

  // dPᵀ[n][m].
  void grad_probabilities(int64_t p, const KeyBlock& block, const AttentionShape&, const Sight&, float* out) const {
    tile_product<Start::zero>(block.count, PANEL, block.values.rows,
                              {grads_by_columns_ + p * PANEL * value_width_, 2 * PANEL}, out, PANEL, value_width_);
  }

  // Of the panel that is number `slot` of those together, from key number `n` of the block on.
  KeepRounded keep(int64_t slot, int64_t n, float*, float*) const {
    const int64_t at = n * ROW + slot * PANEL;
    return {probabilities_ + at, grad_scores_ + at, grad_score_pairs_ + n * PANEL, ROW};
  }

  // dQᵀ[d][m] += sum over n of K[n][d] · dSᵀ[n][m], of keys from number `skipped` of the block on.
  void add_to_queries(const KeyBlock& part, int64_t skipped, const AttentionShape& shape, const Sight& sight,
                      const float*, float* grad_queries) const {
    uint16_t* const pairs = grad_score_pairs_ + skipped * PANEL;
    fill_pairs(part.count, pairs);
    tile_product<Start::resume>(shape.head_dim, PANEL, part.keys.transposed, {pairs, 2 * PANEL}, grad_queries, PANEL,
                                part.count);
    if (!part.keys.finite) {
      add_spoiled(part.keys.rows, part.count, shape.head_dim, pairs, seen_pairs(sight, part.count, seen_),
                  grad_queries);
    }
  }

  // Of all keys that the panels see, whose gradients are given, strip by strip:
  // dV[n][d] += sum over m of Pᵀ[n][m] · dO[m][d], dK[n][d] += sum over m of dSᵀ[n][m] · Q[m][d].
  void add_to_keys(const Sequence&, const KeyRange& block, const SeenKeys (&seen)[TOGETHER], int64_t count,
                   const AttentionShape& shape, const float*, const float*, float* grad_keys,
                   float* grad_values) const {
    const int64_t columns = whole_tiles(shape.head_dim), value_columns = whole_tiles(shape.value_dim);
    for (int64_t first = 0; first < block.count; first += STRIP) {
      const KeyRange strip = {block.first + first, whole_tiles(smaller(STRIP, block.count - first))};
      int64_t begin = 0, end = count;
      while (begin < end && !sees(seen[begin], strip)) begin++;
      while (begin < end && !sees(seen[end - 1], strip)) end--;
      if (begin == end) continue;
      for (int64_t slot = begin; slot < end; slot++) clear_unseen(seen[slot], strip, first, slot);
      const int64_t at = first * ROW + begin * PANEL, query = seen[0].panel + begin, steps = (end - begin) * PANEL;
      tile_product<Start::resume>(strip.count, value_columns, {probabilities_ + at, ROW},
                                  {grads_by_rows_ + query * PANEL * value_width_, 2 * value_width_},
                                  grad_values + first * value_columns, value_columns, steps);
      tile_product<Start::resume>(strip.count, columns, {grad_scores_ + at, ROW},
                                  {queries_by_rows_ + query * PANEL * width_, 2 * width_}, grad_keys + first * columns,
                                  columns, steps);
    }
  }

 private:
  // Of probabilities; a line apart from a power of two, whose rows share few sets of the cache (0.83 of the speed at T
  // = 4096).
  static constexpr int64_t ROW = TOGETHER * PANEL + TILE_NUMBERS;
  // Keys whose gradients are summed over the panels that see any of them; of whole blocks 0.98 of the speed at T = 128.
  static constexpr int64_t STRIP = 2 * TILE_ROWS;
  static_assert(PANELS % TOGETHER == 0 && BLOCK % STRIP == 0);
  int64_t width_, value_width_;                                 // of a query and of a value, in whole steps
  uint16_t *queries_by_columns_, *grads_by_columns_;            // of PANELS panels, in pairs [width / 2][PANEL]
  uint16_t *queries_by_rows_, *grads_by_rows_;                  // in pairs [PANELS · PANEL / 2][width]
  uint16_t* rows_;                                              // [PANEL][width]
  float *products_, *seen_;                                     // [TILE_ROWS][TILE_ROWS]; [BLOCK][PANEL]
  uint16_t *probabilities_, *grad_scores_, *grad_score_pairs_;  // [BLOCK][ROW], and in pairs [BLOCK / 2][PANEL]

  static bool sees(const KeyRange& seen, const KeyRange& strip) {
    return seen.first < strip.first + strip.count && strip.first < seen.first + seen.count;
  }

  // Zeros where the panel in `slot` left nothing, of a strip from row `first` of the block on.
  void clear_unseen(const KeyRange& seen, const KeyRange& strip, int64_t first, int64_t slot) const {
    const int64_t begin = seen.first - strip.first, end = begin + seen.count;
    if (begin <= 0 && strip.count <= end) return;
    for (int64_t n = 0; n < strip.count; n++) {
      if (begin <= n && n < end) continue;
      clear_numbers(probabilities_ + (first + n) * ROW + slot * PANEL, PANEL);
      clear_numbers(grad_scores_ + (first + n) * ROW + slot * PANEL, PANEL);
    }
  }
};

}  // namespace trilby::TRILBY_LEVEL
