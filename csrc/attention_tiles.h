// What attention multiplies, forward and backward, in bf16, on the tile unit or by vectors of pairs: what
// attention_vectors.h is to vectors of floats.
//
// Queries, keys, values, and whatever else is multiplied stay bf16, and so do probabilities and their gradients,
// rounded as PyTorch's kernel does; scores and sums are float32. A left operand has its steps side by side, a right
// operand in pairs: Q is transposed as pairs once for each panel, V once for each block and PANELS panels.
#pragma once

#include "attention_sight.h"
#include "tile_pack.h"

namespace trilby::TRILBY_LEVEL {

// Head dimensions below this leave so much of a tile's 32 steps empty that vectors multiply as fast: D / 2 cycles for
// 16 scores (two multiply-adds a cycle), and a tile 1 and its way out of 2. By the count of instructions, not measured.
// Vectors of pairs multiply no empty steps, but rows are copied with them.
constexpr int64_t LEAST_TILED_DIM = 8;

static inline bool multiplied_by_tiles(const AttentionShape& shape) {
  return shape.dtype == Dtype::bfloat16 && shape.head_dim >= LEAST_TILED_DIM && shape.value_dim >= LEAST_TILED_DIM;
}

// A block of key or value, as [count][D] and, where it is wanted, as [D][count]. There 0 stands for what is not finite:
// 0 · NaN is NaN, and what is hidden must not be felt. add_spoiled adds what it gives to those who see it.
struct TileRows {
  TileOperand rows, transposed;
  bool finite;

  TileRows part(int64_t skipped) const {
    return {{rows.data + skipped * rows.row, rows.row}, {transposed.data + skipped, transposed.row}, finite};
  }
};

// Whether rows are all of a panel, of whole steps side by side: nothing is to be filled up.
static inline bool fills_panel(const View& view, int64_t count, int64_t columns) {
  return count == PANEL && columns % TILE_NUMBERS == 0 && view.column == 1;
}

// `count` rows of key or value where they are, if tiles may be loaded from there: one after the other (a tile's rows at
// a large power of two would fall into few sets of the cache and evict one another), in whole lines, of whole steps,
// and none past the last, which would have to be 0. Else null.
static inline const uint16_t* rows_in_place(const View& view, const KeyRows& rows, int64_t head, int64_t count,
                                            int64_t columns) {
  const uint16_t* from = row_of<const uint16_t>(view, rows.batch, head, rows.row);
  const bool fits = rows.count == count && count % TILE_NUMBERS == 0 && columns % TILE_NUMBERS == 0;
  const bool lies = view.column == 1 && view.row == columns && reinterpret_cast<uintptr_t>(from) % 64 == 0;
  return fits && lies ? from : nullptr;
}

// `count` rows of key or value: where they are, or in `to`.
static inline TileRows load_tile_rows(const AttentionSequences& sequences, const Sequence& sequence, const View& view,
                                      int64_t head, const KeyRange& range, int64_t columns, uint16_t* to,
                                      uint16_t* transposed) {
  const int64_t width = whole_steps(columns), filled = whole_steps(range.count);
  const KeyRows all(sequences, sequence, range.first, range.count);
  const uint16_t* rows = rows_in_place(view, all, head, range.count, columns);
  if (!rows) {
    for (int64_t done = 0; done < range.count;) {
      const KeyRows some(sequences, sequence, range.first + done, range.count - done);
      copy_numbers(row_of<const uint16_t>(view, some.batch, head, some.row), view, some.count, columns, 1.0f,
                   to + done * width, width);
      done += some.count;
    }
    clear_numbers(to + range.count * width, (filled - range.count) * width);
    rows = to;
  }
  if (!transposed) return {{rows, width}, {rows, width}, true};
  const bool finite = all_finite(rows, range.count * width);
  if (finite) {
    transpose_numbers<false>(rows, width, whole_tiles(columns), filled, transposed, BLOCK);
  } else {
    transpose_numbers<true>(rows, width, whole_tiles(columns), filled, transposed, BLOCK);
  }
  return {{rows, width}, {transposed, BLOCK}, finite};
}

// out[d][m] += rows[n][d] · weights[n][m] where rows[n][d] is not finite and seen[n][m] is not 0.
static inline void add_spoiled(TileOperand rows, int64_t count, int64_t columns, const uint16_t* weight_pairs,
                               const float* seen, float* out) {
  for (int64_t n = 0; n < count; n++) {
    for (int64_t d = 0; d < columns; d++) {
      const uint32_t number = static_cast<uint32_t>(rows.data[n * rows.row + d]) << 16;
      if ((number & 0x7f800000u) != 0x7f800000u) continue;
      for (int64_t m = 0; m < PANEL; m += LANES) {
        Bits pairs;
        __builtin_memcpy(&pairs, weight_pairs + (n / 2 * PANEL + m) * 2, sizeof pairs);
        const Vector weights = (Vector)(n % 2 ? pairs & 0xffff0000u : pairs << 16);
        float* sums = out + d * PANEL + m;
        const Vector added = load(sums) + weights * (Vector)(Bits{} + number);
        store(sums, load(seen + n * PANEL + m) != 0.0f ? added : load(sums));
      }
    }
  }
}

// Floats [count][PANEL], of which those past `count` are not read, as a right operand whose steps are keys.
static inline void narrow_pairs(const float* from, int64_t count, uint16_t* to) {
  for (int64_t n = 0; n < count; n += 2) {
    for (int64_t m = 0; m < PANEL; m += LANES) {
      const Vector odd = n + 1 < count ? load(from + (n + 1) * PANEL + m) : Vector{};
      store_pairs(to + n * PANEL + 2 * m, load(from + n * PANEL + m), odd);
    }
  }
}

// Zeros in the steps after `count` of such an operand, up to a whole tile.
static inline void fill_pairs(int64_t count, uint16_t* pairs) {
  const int64_t filled = ceiling(count, 2) * 2;
  clear_numbers(pairs + filled * PANEL, (whole_steps(count) - filled) * PANEL);
}

static inline bool all_ones(Vector vector) {
  return _mm512_cmp_ps_mask((__m512)vector, (__m512)broadcast(1.0f), _CMP_NEQ_UQ) == 0;
}

struct KeyBlock : KeyRange {
  TileRows keys, values;

  KeyBlock part(const KeyRange& range, const AttentionShape&) const {
    const int64_t skipped = range.first - first;
    return {range, keys.part(skipped), values.part(skipped)};
  }
};

// What a task holds while it multiplies. Nothing may throw meanwhile: its scratch memory is there before.
using UnitInUse = TilesInUse;

// Which of key and value are wanted transposed, too.
enum class Transposed { keys, values };

// The blocks of keys and values of one task.
template <Transposed WHICH>
class BlockLoader {
 public:
  void place(Carver& carver, const AttentionShape& shape) {
    keys_ = carver.take<uint16_t>(BLOCK * whole_steps(shape.head_dim));
    values_ = carver.take<uint16_t>(BLOCK * whole_steps(shape.value_dim));
    const int64_t columns = WHICH == Transposed::keys ? shape.head_dim : shape.value_dim;
    transposed_ = carver.take<uint16_t>(whole_tiles(columns) * BLOCK);
  }

  template <class Format, class Problem>
  KeyBlock load_block(const Problem& problem, const Sequence& sequence, int64_t head, int64_t first,
                      int64_t count) const {
    const AttentionSequences& sequences = problem.sequences;
    const KeyRange range = {first, count};
    return {range,
            load_tile_rows(sequences, sequence, problem.key, head, range, problem.shape.head_dim, keys_,
                           WHICH == Transposed::keys ? transposed_ : nullptr),
            load_tile_rows(sequences, sequence, problem.value, head, range, problem.shape.value_dim, values_,
                           WHICH == Transposed::values ? transposed_ : nullptr)};
  }

  // Without values.
  template <class Format, class Problem>
  KeyBlock load_keys(const Problem& problem, const Sequence& sequence, int64_t head, const KeyRange& range) const {
    return {range, load_tile_rows({}, sequence, problem.key, head, range, problem.shape.head_dim, keys_, nullptr), {}};
  }

 private:
  uint16_t *keys_, *values_, *transposed_;
};

// Probabilities go where the products read them, rounded.
struct KeepInPairs {
  static constexpr int KEYS = 2;  // at once
  static constexpr bool IN_PLACE = false;
  uint16_t* pairs;
  void operator()(int64_t n, int c, const Vector (&results)[KEYS]) const {
    store_pairs(pairs + n * PANEL + 2 * c * LANES, results[0], results[1]);
  }
};

struct ForwardProducts {
  static constexpr int64_t STEP = TILE_NUMBERS;  // what a panel sees of a block begins at multiples of so many keys
  static constexpr int64_t PART = 64;            // keys whose scores are made at once
  // Probabilities may be so much larger than 1, as a power of 2, before outputs shrink for a new maximum: they are as
  // exact as smaller ones, and outputs are left alone (which measured 1.03 times as fast).
  static constexpr float SLACK = 8.0f;
  BlockLoader<Transposed::values> blocks;

  static int64_t output_rows(int64_t value_dim) { return whole_tiles(value_dim); }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    width_ = whole_steps(shape.head_dim);
    rows_ = carver.take<uint16_t>(PANEL * width_);
    queries_ = carver.take<uint16_t>(PANELS * width_ * PANEL);
    probabilities_ = carver.take<uint16_t>(BLOCK * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  template <class Format>
  void pack_queries(int64_t p, const uint16_t* from, const View& view, int64_t count, int64_t head_dim,
                    float sign) const {
    uint16_t* queries = queries_ + p * width_ * PANEL;
    if (sign == 1.0f && fills_panel(view, count, head_dim)) {
      return pair_columns({from, view.row}, width_, PANEL, queries);
    }
    copy_numbers(from, view, count, head_dim, sign, rows_, width_);
    clear_numbers(rows_ + count * width_, (PANEL - count) * width_);
    pair_columns({rows_, width_}, width_, PANEL, queries);
  }

  // Sᵀ[n][m] of panel p.
  void scores(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight&, float* out) const {
    tile_product<Start::zero>(block.count, PANEL, block.keys.rows, {queries_ + p * width_ * PANEL, 2 * PANEL}, out,
                              PANEL, shape.head_dim);
  }

  KeepInPairs keep(int64_t skipped, float*) const { return {probabilities_ + skipped * PANEL}; }
  void take_probabilities(int64_t skipped, const float* from, int64_t count) const {
    narrow_pairs(from, count, probabilities_ + skipped * PANEL);
  }

  // Whether every query has seen a key.
  static bool all_seen(Vector maxima) {
    return _mm512_cmp_ps_mask((__m512)maxima, (__m512)broadcast(-INFINITE), _CMP_EQ_OQ) == 0;
  }
  // Whether no probability is so large that its maximum must rise, to go by sums of them.
  static bool all_within_slack(Vector sums) {
    return _mm512_cmp_ps_mask((__m512)sums, (__m512)broadcast(256.0f), _CMP_NLE_UQ) == 0;
  }

  // Whether a maximum has risen so far that outputs shrink, before these probabilities' values are added.
  static bool shrink_first(const float* factors) {
    bool all = true;
    for (int64_t m = 0; m < PANEL; m += LANES) all &= all_ones(load(factors + m));
    return !all;
  }

  // Oᵀ[d][m] = Oᵀ[d][m] · factors[m].
  static void shrink(const float* factors, int64_t value_dim, float* outputs) {
    for (int64_t m = 0; m < PANEL; m += LANES) {
      const Vector factor = load(factors + m);
      for (int64_t i = m; i < value_dim * PANEL; i += PANEL) store(outputs + i, load(outputs + i) * factor);
    }
  }

  // Oᵀ[d][m] += sum over n of V[n][d] · Pᵀ[n][m], of keys from number `skipped` of the block on.
  void add_values(int64_t skipped, const KeyBlock& block, const AttentionShape& shape, const Sight& sight, const float*,
                  const float*, float* outputs) const {
    uint16_t* const probabilities = probabilities_ + skipped * PANEL;
    fill_pairs(block.count, probabilities);
    tile_product<Start::resume>(shape.value_dim, PANEL, block.values.transposed, {probabilities, 2 * PANEL}, outputs,
                                PANEL, block.count);
    if (!block.values.finite) {
      add_spoiled(block.values.rows, block.count, shape.value_dim, probabilities, seen_pairs(sight, block.count, seen_),
                  outputs);
    }
  }

 private:
  int64_t width_;              // of a query, in whole steps
  uint16_t *rows_, *queries_;  // [PANEL][width]; of PANELS panels, in pairs [width / 2][PANEL]
  uint16_t* probabilities_;    // in pairs [BLOCK / 2][PANEL]
  float* seen_;                // [BLOCK][PANEL]
};

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
    const TileOperand queries = panel_rows(query, problem.query, count, problem.shape.head_dim, width_);
    pair_columns(queries, width_, PANEL, queries_by_columns_ + p * PANEL * width_);
    pair_rows(queries, width_, PANEL, queries_by_rows_ + p * PANEL * width_);
    const TileOperand grads = panel_rows(grad, problem.grad_output, count, problem.shape.value_dim, value_width_);
    uint16_t* const by_columns = grads_by_columns_ + p * PANEL * value_width_;
    pair_columns(grads, value_width_, PANEL, by_columns);
    pair_rows(grads, value_width_, PANEL, grads_by_rows_ + p * PANEL * value_width_);
    const TileOperand outputs = panel_rows(output, problem.output, count, problem.shape.value_dim, value_width_);
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
    for (int64_t n = 0; n < strip.count; n++) {
      const int64_t key = strip.first + n;
      if (seen.first <= key && key < seen.first + seen.count) continue;
      clear_numbers(probabilities_ + (first + n) * ROW + slot * PANEL, PANEL);
      clear_numbers(grad_scores_ + (first + n) * ROW + slot * PANEL, PANEL);
    }
  }

  // A panel's rows where they are, or, where they fill no panel and no steps, copied, and zeros after them.
  TileOperand panel_rows(const uint16_t* from, const View& view, int64_t count, int64_t columns, int64_t width) const {
    if (fills_panel(view, count, columns)) return {from, view.row};
    copy_numbers(from, view, count, columns, 1.0f, rows_, width);
    clear_numbers(rows_ + count * width, (PANEL - count) * width);
    return {rows_, width};
  }
};

}  // namespace trilby::TRILBY_LEVEL
