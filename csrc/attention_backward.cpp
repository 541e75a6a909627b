// Attention, backward, on one instruction-set level.
//
// As in the forward, a panel of queries lies in the lanes. For every block of keys that it sees,
//     Sᵀ[n][m]  = sum over d of K[n][d] · Qᵀ[d][m]         Pᵀ = 2^((Sᵀ · scale - logsumexp[m]) · log2(e))
//     dPᵀ[n][m] = sum over d of V[n][d] · dOᵀ[d][m]        dSᵀ = Pᵀ · (dPᵀ - delta[m]),  delta = rowsum(dO · O)
//     dQᵀ[d][m] += sum over n of K[n][d] · dSᵀ[n][m]
//     dV[n][d]  += sum over m of Pᵀ[n][m] · dO[m][d]
//     dK[n][d]  += sum over m of dSᵀ[n][m] · Q[m][d]
// all in float32: five products, 10 · D flops for each visible pair, and one exp2. What the forward does to scores,
// masks and dropout included, is done again: dropout multiplies Pᵀ where it enters dV, and dPᵀ.
// On the tile unit (level amx) the products take 10 cycles for 16 scores at D = 64. Vectors do the rest, 20
// instructions for P and dS and 3.5 to round them, by rows and in pairs. Measured on one core of an Emerald Rapids, T =
// 1024, D = 64, without a mask: 54 cycles for 16 scores, of which S and dP take 11, P and dS 13, dQ 5, dK and dV 10,
// packing and the gradients' way out 8; 75 while P and dS went through memory as floats, and 65 while the scores of a
// whole block were made at once and each panel added to dK and dV alone.
//
// One pass over a head makes all three gradients, with dK and dV of the whole head in scratch memory. Where there are
// too few heads for the threads, or the head is too long for the scratch, two passes split the sequence: dQ by tiles of
// queries (three products), dK and dV by tiles of keys (four). Every sum is taken over the same terms in the same order
// in both, so that the result is the same, bit for bit, for any number of threads.
#include "attention_dropout.h"
#include "attention_products.h"
#include "attention_score.h"
#include "level.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Keys whose dK and dV one task of the second pass keeps: packing a panel of queries costs each block a quarter.
constexpr int64_t KEY_TILE = 4 * BLOCK;
// The most scratch memory that dK and dV of one head may take for the single pass, in floats: 8 MiB a thread.
constexpr int64_t LONGEST_PASS = 2 * 1024 * 1024;
constexpr int64_t PART = BackwardProducts::PART, TOGETHER = BackwardProducts::TOGETHER;

// One panel of queries. Lanes past the last query hold zeros and a logsumexp of infinity: their probabilities are 0.
struct Panel {
  int64_t number, first_query, count;
  float *grad_queries, *logsumexp, *delta;  // [D][PANEL], [PANEL], [PANEL]
  DropoutRows rows;
};

struct Workspace {
  BackwardProducts products;
  Panel panel[PANELS];
  float *probabilities, *grad_scores;  // [PART][PANEL]
  float *grad_keys, *grad_values;      // [gradient rows][D], [gradient rows][Dv], in whole vectors
  float* mask;                         // [BLOCK][PANEL]
  float *slopes, *dropout_factors;     // [PART][PANEL]; slopes are those of the softcap

  Workspace(const AttentionShape& shape, int64_t gradient_rows) {
    carve([&](Carver& carver) { place(carver, shape, gradient_rows); });
  }

 private:
  void place(Carver& carver, const AttentionShape& shape, int64_t gradient_rows) {
    products.place(carver, shape);
    for (int64_t p = 0; p < PANELS; p++) {
      panel[p].number = p;
      panel[p].grad_queries = carver.take(BackwardProducts::query_columns(shape.head_dim) * PANEL);
      panel[p].logsumexp = carver.take(PANEL);
      panel[p].delta = carver.take(PANEL);
    }
    probabilities = carver.take(PART * PANEL);
    grad_scores = carver.take(PART * PANEL);
    const int64_t rows = BackwardProducts::key_rows(gradient_rows);
    grad_keys = carver.take(rows * whole_vectors(shape.head_dim));
    grad_values = carver.take(rows * whole_vectors(shape.value_dim));
    mask = carver.take(BLOCK * PANEL);
    slopes = carver.take(PART * PANEL);
    dropout_factors = carver.take(PART * PANEL);
  }
};

// Which gradients a pass makes.
enum class Wanted { all, query, key_and_value };

// One head of one sequence.
struct Head {
  Sequence sequence;
  int64_t query_head, key_head;
};

template <class Format>
void load_panel(const AttentionBackward& problem, const Head& head, int64_t first_query, const Workspace& work,
                Panel& panel) {
  using Element = typename Format::Element;
  const AttentionShape& shape = problem.shape;
  const int64_t batch = head.sequence.batch, row = head.sequence.first_query + first_query;
  panel.first_query = first_query;
  panel.count = smaller(head.sequence.queries - first_query, PANEL);
  work.products.load_panel<Format>(panel.number, problem, row_of<Element>(problem.query, batch, head.query_head, row),
                                   row_of<Element>(problem.grad_output, batch, head.query_head, row),
                                   row_of<Element>(problem.output, batch, head.query_head, row), panel.count,
                                   panel.delta);
  const float* logsumexp = problem.logsumexp + (batch * shape.query_heads + head.query_head) * shape.query_length + row;
  for (int64_t m = 0; m < PANEL; m++) {
    panel.logsumexp[m] = m < panel.count ? logsumexp[m] : INFINITE;
    if (panel.logsumexp[m] == -INFINITE) panel.logsumexp[m] = 0.0f;  // every score was -inf: 2^(-inf - 0)
  }
  clear(panel.grad_queries, BackwardProducts::query_columns(shape.head_dim) * PANEL);
  if (problem.rule.dropout.threshold) {
    panel.rows.start(problem.rule.dropout, batch * shape.query_heads + head.query_head, row);
  }
}

// A block's scores and the gradients of its probabilities, both [keys][PANEL], and what becomes of these.
struct BlockScores {
  float *scores, *grad_probabilities;
  const float *factors, *slopes;  // of dropout and of the softcap, if any
  float scale, hidden;            // `hidden` stands for a score that is
};

// Scores to probabilities, their gradients to the scores' gradients, which go to keep(n, c, those of the keys from n on
// in the vectors from c on, both). With dropout only probabilities that are kept stay, unmultiplied.
template <bool DROPOUT, bool SOFTCAP, bool HIDES, class Keep>
void softmax_backward(const BlockScores& block, const Sight& sight, const Panel& panel, const Keep& keep) {
  constexpr int KEYS = Keep::KEYS, VECTORS = Keep::VECTORS;
  for (int first = 0; first < sight.vectors; first += VECTORS) {
    Vector logsumexp[VECTORS], delta[VECTORS];
    for (int c = 0; c < VECTORS; c++) {
      logsumexp[c] = load(panel.logsumexp + (first + c) * LANES);
      delta[c] = load(panel.delta + (first + c) * LANES);
    }
    Vector probabilities[KEYS][VECTORS], grad_scores[KEYS][VECTORS];
    const auto compute = [&](int key, int c, int64_t at) __attribute__((always_inline)) {
      const Vector score = load(block.scores + at);
      const Vector all = exp2_of_nonpositive((score * block.scale - logsumexp[c]) * LOG2_E);
      Vector probability = all, gradient = load(block.grad_probabilities + at);
      if constexpr (DROPOUT) {
        const Vector factor = load(block.factors + at);
        probability = factor == 0.0f ? Vector{} : all;
        gradient *= factor;
      }
      gradient = all * (gradient - delta[c]);
      if constexpr (SOFTCAP) gradient *= load(block.slopes + at);
      if constexpr (HIDES) {  // of what is hidden nothing must be felt, be its gradient a NaN
        probability = score == block.hidden ? Vector{} : probability;
        gradient = score == block.hidden ? Vector{} : gradient;
      }
      probabilities[key][c] = probability;
      grad_scores[key][c] = gradient;
    };
    const int64_t keys = sight.ends[first + VECTORS - 1];
    int64_t n = 0;
    for (; n + KEYS <= keys; n += KEYS) {
      for (int key = 0; key < KEYS; key++) {
        for (int c = 0; c < VECTORS; c++) compute(key, c, (n + key) * PANEL + (first + c) * LANES);
      }
      keep(n, first, probabilities, grad_scores);
    }
    if constexpr (KEYS == 2) {
      if (n == keys) continue;
      for (int c = 0; c < VECTORS; c++) {
        compute(0, c, n * PANEL + (first + c) * LANES);
        probabilities[1][c] = grad_scores[1][c] = Vector{};
      }
      keep(n, first, probabilities, grad_scores);
    }
  }
}

// Calls compute(std::true_type{}) or compute(std::false_type{}).
template <class Compute>
void as_constant(bool condition, const Compute& compute) {
  if (condition) return compute(std::true_type{});
  compute(std::false_type{});
}

// Probabilities and the scores' gradients of a part of a block, to where `keep` puts them.
template <class Keep>
void score_gradients(const AttentionBackward& problem, const Head& head, const Panel& panel, const KeyBlock& part,
                     const Sight& sight, const Workspace& work, const Keep& keep) {
  const AttentionRule& rule = problem.rule;
  work.products.scores(panel.number, part, problem.shape, sight, work.probabilities);
  work.products.grad_probabilities(panel.number, part, problem.shape, sight, work.grad_scores);
  BlockScores scores = {work.probabilities, work.grad_scores, work.dropout_factors, work.slopes, rule.scale, -INFINITE};
  if (adjusts(rule)) {
    adjust(rule, rule.scale, head.sequence, head.query_head, sight, part.count, work.probabilities, work.slopes);
    scores.scale = 1.0f;
    UnitInUse::keep_awake();
  }
  if (scores.scale < 0.0f) scores.hidden = INFINITE;
  if (rule.dropout.threshold) {
    dropout_factors(rule.dropout, panel.rows, part.first, sight, work.dropout_factors);
    UnitInUse::keep_awake();
  }
  const bool hides = sight.hides(part);
  if (hides) hide(work.probabilities, sight, scores.hidden);
  as_constant(rule.dropout.threshold != 0, [&](auto dropout) {
    as_constant(rule.softcap > 0.0f, [&](auto softcap) {
      as_constant(hides, [&](auto hidden) {
        softmax_backward<decltype(dropout)::value, decltype(softcap)::value, decltype(hidden)::value>(scores, sight,
                                                                                                      panel, keep);
      });
    });
  });
}

// What a block gives to the gradients of a panel, number `slot` of those together, and what the panel will give to
// those of the keys that it sees, which are told.
SeenKeys back_propagate(const AttentionBackward& problem, const Head& head, const Panel& panel, int64_t slot,
                        const KeyBlock& whole, const Workspace& work, Wanted wanted) {
  const AttentionShape& shape = problem.shape;
  const SeenKeys none = {{whole.first, 0}, panel.number, panel.first_query};
  const KeyRange range =
      seen_part(whole, head.sequence, panel.first_query, panel.first_query + PANEL, BackwardProducts::STEP);
  if (range.count <= 0) return none;
  const KeyBlock block = whole.part(range, shape);
  const MaskBlock mask = load_mask(problem.rule, head.sequence, head.query_head, panel.first_query, panel.count,
                                   block.first, block.count, work.mask);
  if (mask.hides_all) return none;
  const int64_t skipped = block.first - whole.first;
  for (int64_t n = 0; n < block.count; n += PART) {
    const KeyBlock part = block.part({block.first + n, smaller(PART, block.count - n)}, shape);
    const Sight sight(head.sequence, panel.first_query, part, mask.part(n));
    score_gradients(problem, head, panel, part, sight, work,
                    work.products.keep(slot, skipped + n, work.probabilities, work.grad_scores));
  }
  if (wanted != Wanted::key_and_value) {
    const Sight sight(head.sequence, panel.first_query, block, mask);
    work.products.add_to_queries(block, skipped, shape, sight, work.grad_scores, panel.grad_queries);
  }
  return {range, panel.number, panel.first_query};
}

// What `count` panels and one block give to each other's gradients; those of the block's keys start at grad_keys and
// grad_values.
void back_propagate_together(const AttentionBackward& problem, const Head& head, const Panel* panels, int64_t count,
                             const KeyBlock& block, const Workspace& work, Wanted wanted, float* grad_keys,
                             float* grad_values) {
  SeenKeys seen[TOGETHER];
  for (int64_t slot = 0; slot < count; slot++) {
    seen[slot] = back_propagate(problem, head, panels[slot], slot, block, work, wanted);
  }
  if (wanted == Wanted::query) return;
  work.products.add_to_keys(head.sequence, block, seen, count, problem.shape, work.probabilities, work.grad_scores,
                            grad_keys, grad_values);
}

// One tile of queries against the keys [first_key, end_key), whose gradients start at work.grad_keys, work.grad_values.
template <class Format>
void backward_tile(const AttentionBackward& problem, const Head& head, int64_t first_query, int64_t panels,
                   int64_t first_key, int64_t end_key, Wanted wanted, Workspace& work) {
  const AttentionShape& shape = problem.shape;
  const Sequence& sequence = head.sequence;
  for (int64_t p = 0; p < panels; p++) {
    load_panel<Format>(problem, head, first_query + p * PANEL, work, work.panel[p]);
  }
  const int64_t end = smaller(end_key, sequence.end_seen(first_query + panels * PANEL));
  const int64_t begin = greater(first_key, sequence.first_seen(first_query) / BLOCK * BLOCK);
  for (int64_t first = begin; first < end; first += BLOCK) {
    const KeyBlock block =
        work.products.blocks.load_block<Format>(problem, sequence, head.key_head, first, smaller(end - first, BLOCK));
    float* grad_keys = work.grad_keys + (first - first_key) * whole_vectors(shape.head_dim);
    float* grad_values = work.grad_values + (first - first_key) * whole_vectors(shape.value_dim);
    for (int64_t p = 0; p < panels; p += TOGETHER) {
      back_propagate_together(problem, head, work.panel + p, smaller(TOGETHER, panels - p), block, work, wanted,
                              grad_keys, grad_values);
    }
  }
  if (wanted == Wanted::key_and_value) return;
  float scales[PANEL];
  for (float& scale : scales) scale = problem.rule.scale;
  for (int64_t p = 0; p < panels; p++) {
    const Panel& panel = work.panel[p];
    using Element = typename Format::Element;
    unpack_panel<Format>(
        panel.grad_queries, scales, panel.count, shape.head_dim,
        row_of<Element>(problem.grad_query, sequence.batch, head.query_head, sequence.first_query + panel.first_query),
        problem.grad_query.row);
  }
}

// Rows [rows][columns] of a gradient, multiplied by `scale`, to where they belong.
template <class Format>
void write_rows(const float* gradient, int64_t rows, int64_t columns, float scale, typename Format::Element* to,
                int64_t stride) {
  const int64_t width = whole_vectors(columns);
  for (int64_t n = 0; n < rows; n++) {
    int64_t d = 0;
    for (; d + LANES <= columns; d += LANES) {
      Format::store_vector(to + n * stride + d, load(gradient + n * width + d) * scale);
    }
    if (d < columns) store_some<Format>(to + n * stride + d, load(gradient + n * width + d) * scale, columns - d);
  }
}

// Everything that the queries [first_query, end_query) of a sequence, a multiple of tiles, give to its keys
// [first_key, end_key) of one head of keys.
template <class Format>
void backward_keys(const AttentionBackward& problem, const Sequence& sequence, int64_t key_head, int64_t first_query,
                   int64_t end_query, int64_t first_key, int64_t end_key, Wanted wanted) {
  const AttentionShape& shape = problem.shape;
  const int64_t keys = end_key - first_key, group = shape.query_heads / shape.key_heads;
  Workspace work(shape, keys);
  const UnitInUse unit;
  clear(work.grad_keys, BackwardProducts::key_rows(keys) * whole_vectors(shape.head_dim));
  clear(work.grad_values, BackwardProducts::key_rows(keys) * whole_vectors(shape.value_dim));
  for (int64_t query_head = key_head * group; query_head < (key_head + 1) * group; query_head++) {
    for (int64_t query = first_query; query < end_query; query += PANELS * PANEL) {
      const int64_t panels = smaller(PANELS, ceiling(end_query - query, PANEL));
      backward_tile<Format>(problem, {sequence, query_head, key_head}, query, panels, first_key, end_key, wanted, work);
    }
  }
  using Element = typename Format::Element;
  const int64_t row = sequence.first_key + first_key;
  write_rows<Format>(work.grad_keys, keys, shape.head_dim, problem.rule.scale,
                     row_of<Element>(problem.grad_key, sequence.batch, key_head, row), problem.grad_key.row);
  write_rows<Format>(work.grad_values, keys, shape.value_dim, problem.rule.dropout.scale,
                     row_of<Element>(problem.grad_value, sequence.batch, key_head, row), problem.grad_value.row);
}

// dK and dV of every head of keys of every sequence, and dQ with them.
template <class Format>
void backward_in_one_pass(const AttentionBackward& problem, const Threads& threads) {
  const int64_t key_heads = problem.shape.key_heads;
  deal(problem.sequences.count * key_heads, threads, [&](int64_t task) {
    const Sequence sequence(problem.shape, problem.sequences, problem.rule, task / key_heads);
    backward_keys<Format>(problem, sequence, task % key_heads, 0, sequence.queries, 0, sequence.key_rows, Wanted::all);
  });
}

template <class Format>
void backward_by_queries(const AttentionBackward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t heads = shape.query_heads;
  const int64_t panels = panels_in_tile(shape.batch * heads, shape.query_length, threads.count);
  const Tiles tiles = {problem.sequences.query_starts, problem.sequences.count, shape.query_length, panels * PANEL};
  deal(heads * tiles.count(), threads, [&](int64_t task) {
    const Tiles::Tile tile = tiles[tiles.count() - 1 - task / heads];
    const int64_t head = task % heads;
    const Sequence sequence(shape, problem.sequences, problem.rule, tile.sequence);
    if (tile.first >= sequence.queries) return;
    const int64_t count = smaller(panels, ceiling(sequence.queries - tile.first, PANEL));
    Workspace work(shape, 0);
    const UnitInUse unit;
    backward_tile<Format>(problem, {sequence, head, head / (heads / shape.key_heads)}, tile.first, count, 0,
                          sequence.keys, Wanted::query, work);
  });
}

template <class Format>
void backward_by_keys(const AttentionBackward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t key_heads = shape.key_heads;
  const Tiles tiles = {problem.sequences.key_starts, problem.sequences.count, shape.key_length, KEY_TILE};
  deal(key_heads * tiles.count(), threads, [&](int64_t task) {
    // Longest first: under a causal mask the first keys are seen by the most queries, the others by none before them.
    const Tiles::Tile tile = tiles[task / key_heads];
    const Sequence sequence(shape, problem.sequences, problem.rule, tile.sequence);
    if (tile.first >= sequence.key_rows) return;
    const int64_t end_key = smaller(tile.first + KEY_TILE, sequence.key_rows);
    const int64_t first_query = sequence.first_seeing(tile.first) / (PANELS * PANEL) * (PANELS * PANEL);
    backward_keys<Format>(problem, sequence, task % key_heads, first_query, sequence.end_seeing(end_key), tile.first,
                          end_key, Wanted::key_and_value);
  });
}

// Five products on as many threads as there are heads of keys, or seven on all of them: whichever ends sooner. Packed
// sequences differ, and the longest may come last.
bool one_pass_is_best(const AttentionBackward& problem, int64_t threads) {
  const AttentionShape& shape = problem.shape;
  const AttentionSequences& sequences = problem.sequences;
  const int64_t heads = sequences.count * shape.key_heads;
  int64_t most_keys = shape.key_length;
  bool best = 5 * ceiling(heads, threads) * threads <= 7 * heads;
  if (sequences.key_starts) {
    int64_t pairs = 0, most_pairs = 0;
    most_keys = 0;
    for (int64_t n = 0; n < sequences.count; n++) {
      const Sequence sequence(shape, sequences, problem.rule, n);
      pairs += sequence.queries * sequence.keys;
      most_pairs = greater(most_pairs, sequence.queries * sequence.keys);
      most_keys = greater(most_keys, sequence.key_rows);
    }
    best = 5 * (threads - 1) * most_pairs <= 2 * pairs * shape.key_heads;
  }
  return best && most_keys * (whole_vectors(shape.head_dim) + whole_vectors(shape.value_dim)) <= LONGEST_PASS;
}

// The gradients of what belongs to no sequence.
template <class Format>
void clear_gradients_of_unowned(const AttentionBackward& problem) {
  const AttentionShape& shape = problem.shape;
  const AttentionSequences& sequences = problem.sequences;
  clear_unowned(sequences.query_starts, sequences.count, shape.query_length, [&](int64_t first, int64_t end) {
    for (int64_t head = 0; head < shape.query_heads; head++) {
      clear_rows<Format>(problem.grad_query, 0, head, first, end, shape.head_dim);
    }
  });
  clear_unowned(sequences.key_starts, sequences.count, shape.key_length, [&](int64_t first, int64_t end) {
    for (int64_t head = 0; head < shape.key_heads; head++) {
      clear_rows<Format>(problem.grad_key, 0, head, first, end, shape.head_dim);
      clear_rows<Format>(problem.grad_value, 0, head, first, end, shape.value_dim);
    }
  });
}

template <class Format>
void backward(const AttentionBackward& problem, const Threads& threads) {
  if (one_pass_is_best(problem, threads.count)) {
    backward_in_one_pass<Format>(problem, threads);
  } else {
    backward_by_queries<Format>(problem, threads);
    backward_by_keys<Format>(problem, threads);
  }
  clear_gradients_of_unowned<Format>(problem);
}

}  // namespace

void attention_backward(const AttentionBackward& problem, const Threads& threads) {
  in_its_format(problem, threads, TRILBY_VECTOR_LEVEL::attention_backward,
                [&](auto format) { backward<decltype(format)>(problem, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
