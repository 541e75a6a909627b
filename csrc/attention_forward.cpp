// Attention, forward, on one instruction-set level.
//
// The queries lie in the lanes: a panel of PANEL queries is transposed once, and then, block of keys by block of keys,
//     Sᵀ[n][m] = sum over d of K[n][d] · Qᵀ[d][m]       K is read element by element
//     Pᵀ[n][m] = 2^((Sᵀ[n][m] - max[m]) · c)             online softmax, one query a lane: no horizontal reduction
//     Oᵀ[d][m] = Oᵀ[d][m] · 2^((old max - max) · c) + sum over n of V[n][d] · Pᵀ[n][m]
// with c = |scale| · log2(e), so that neither K nor V is ever transposed, and the T x S scores never exist. Differences
// are taken before they are scaled: scores of 10^5, scaled first, would be off by 0.01.
//
// Operations: 2 · D + 2 · Dv flops and one exp2 (12 instructions for LANES scores) for each visible (query, key) pair,
// and for hidden ones at each edge of what a query sees: LANES / 2 down a panel's stairs, else at most PANEL / 2. For
// LANES scores, beside that: dropout 17 instructions, softcap 25, ALiBi 6, a mask 10 (6 of them its transposition).
// Of the time at T = 128, D = 64, in percent, before the stairs: products 60, at 86 % of the processor's multiply-adds,
// diagonal counted; softmax 13; Q's transposition 8; O's 8; the look for NaN 4; hiding 3.
// On the tile unit (level amx) the two products take 4 cycles for 16 scores at D = 64. Vectors do the rest, counted in
// the machine code for 16 scores: 2^x, its sum, rounding and pairing 17; the maximum 3.5 instructions more, but where
// probabilities by the old maximum sum to little enough, none is looked for (1.08 times as fast). Sums come and go once
// a block, and shrink, 3 · Dv / 64 instructions more, only where a maximum rose by much. Measured on one core of an
// Emerald Rapids at T = 1024, D = 64, without a mask: 23 cycles for 16 scores, of which packing takes 2, the softmax 9,
// the products 9; in the first-level cache alone these take 5.4. Tried, and no faster: the next panel's scores and the
// last one's values multiplied in pieces between a softmax's instructions (0.95 to 1.05 of the speed); sums or values
// asked for ahead (0.92 to 0.97); the next part's scores begun before a softmax (0.97). A scale that is multiplied in
// the subtraction of the maximum gains 1.03, and rounds maxima of 10^5 by more than probabilities are. While another
// program is at the same core's tile unit, loading a tile takes 29 cycles and multiplying 37, and they no longer
// overlap. Traffic: Q and O once; K and V once for every PANELS · PANEL queries, from the nearest cache that holds
// them.
#include "attention_forward.h"

#include "attention_dropout.h"
#include "attention_products.h"
#include "level.h"

namespace trilby::TRILBY_LEVEL {

namespace {

struct Workspace {
  ForwardProducts products;
  float *outputs, *maxima, *sums;  // of PANELS panels: [Dv][PANEL], [PANEL], [PANEL]
  float *scores, *mask, *factors;  // [PART][PANEL], [BLOCK][PANEL], [PANEL]

  explicit Workspace(const AttentionShape& shape) {
    carve([&](Carver& carver) { place(carver, shape); });
  }

 private:
  void place(Carver& carver, const AttentionShape& shape) {
    products.place(carver, shape);
    outputs = carver.take(PANELS * ForwardProducts::output_rows(shape.value_dim) * PANEL);
    maxima = carver.take(PANELS * PANEL);
    sums = carver.take(PANELS * PANEL);
    scores = carver.take(ForwardProducts::PART * PANEL);
    mask = carver.take(BLOCK * PANEL);
    factors = carver.take(PANEL);
  }
};

// One head of one sequence.
struct Head {
  Sequence sequence;
  int64_t query_head, key_head;
};

// One panel of queries and what its online softmax has come to.
struct Panel {
  int64_t number, first_query, count;
  float *outputs, *maxima, *sums;
  bool empty;  // nothing was added to outputs yet
  DropoutRows rows;
};

// The largest of the scores of some keys and one vector of queries, and of `before`. Four keys take turns: one alone
// would wait for its own maximum.
Vector largest(const float* column, int64_t keys, Vector before) {
  constexpr int TURNS = 4;
  Vector maximum[TURNS];
  for (Vector& its : maximum) its = before;
  int64_t n = 0;
  for (; n + TURNS <= keys; n += TURNS) {
    for (int turn = 0; turn < TURNS; turn++) maximum[turn] = larger(load(column + (n + turn) * PANEL), maximum[turn]);
  }
  for (; n < keys; n++) maximum[0] = larger(load(column + n * PANEL), maximum[0]);
  return larger(larger(maximum[0], maximum[1]), larger(maximum[2], maximum[3]));
}

// Probabilities relative to `maximum` of some keys and vector c of the queries, to keep(n, c, those of the keys from n
// on); their sums.
template <class Keep>
Vector exponentials(const float* column, int64_t keys, int c, Vector maximum, float scale, const Keep& keep) {
  const auto probability = [&](int64_t key) __attribute__((always_inline)) {
    return exp2_of_nonpositive((load(column + key * PANEL) - maximum) * scale);
  };
  Vector sum = {};
  int64_t n = 0;
  for (; n + Keep::KEYS <= keys; n += Keep::KEYS) {
    Vector results[Keep::KEYS];
    for (int key = 0; key < Keep::KEYS; key++) sum += results[key] = probability(n + key);
    keep(n, c, results);
  }
  if constexpr (Keep::KEYS == 2) {
    if (n < keys) {
      const Vector last = probability(n);
      sum += last;
      keep(n, c, {last, Vector{}});
    }
  }
  return sum;
}

// Turns scores into probabilities relative to the running maximum; leaves in `factors` what the old sums shrink by.
template <class Keep>
void online_softmax(const float* scores, const Sight& sight, float scale, float* maxima, float* sums, float* factors,
                    const Keep& keep) {
  constexpr float SLACK = ForwardProducts::SLACK, LARGEST = 1 << ForwardProducts::SLACK;
  for (int c = 0; c < sight.vectors; c++) {
    const float* column = scores + c * LANES;
    const int64_t keys = sight.ends[c];
    const Vector before = load(maxima + c * LANES);
    UnitInUse::keep_awake();
    if constexpr (SLACK > 0.0f && !Keep::IN_PLACE) {
      if (!any(before == -INFINITE)) {
        const Vector sum = exponentials(column, keys, c, before, scale, keep);
        if (!any(~(sum <= LARGEST))) {  // then no score is so far above its maximum that this must rise; nor a NaN
          store(factors + c * LANES, broadcast(1.0f));
          store(sums + c * LANES, load(sums + c * LANES) + sum);
          continue;
        }
      }
    }
    Vector after = largest(column, keys, before);
    if constexpr (SLACK > 0.0f) after = (after - before) * scale <= SLACK ? before : after;
    const Vector shift = after == -INFINITE ? Vector{} : after;  // nothing seen yet: -inf - 0, not -inf + inf
    const Vector sum = exponentials(column, keys, c, shift, scale, keep);
    // 1 for what has seen nothing yet, too, so that it makes no outputs shrink.
    const Vector factor = before == after ? broadcast(1.0f) : exp2_of_nonpositive((before - shift) * scale);
    store(factors + c * LANES, factor);
    store(sums + c * LANES, load(sums + c * LANES) * factor + sum);
    store(maxima + c * LANES, after);
  }
}

// Scores of a panel and the keys of a part of a block, from number `skipped` of the block on, to probabilities.
void score_part(const AttentionForward& problem, const Head& head, const Panel& panel, const KeyBlock& part,
                const Sight& sight, int64_t skipped, const Workspace& work) {
  const AttentionRule& rule = problem.rule;
  const Scale scale(rule);
  work.products.scores(panel.number, part, problem.shape, sight, work.scores);
  if (adjusts(rule)) {
    adjust(rule, scale.size, head.sequence, head.query_head, sight, part.count, work.scores, nullptr);
    UnitInUse::keep_awake();
  }
  if (sight.hides(part)) hide(work.scores, sight, -INFINITE);
  const float factor = scale.within * LOG2_E;
  if (rule.dropout.threshold) {
    online_softmax(work.scores, sight, factor, panel.maxima, panel.sums, work.factors, KeepInPlace{work.scores});
    UnitInUse::keep_awake();
    drop(rule.dropout, panel.rows, part.first, sight, work.scores);
    work.products.take_probabilities(skipped, work.scores, part.count);
  } else {
    online_softmax(work.scores, sight, factor, panel.maxima, panel.sums, work.factors,
                   work.products.keep(skipped, work.scores));
  }
}

// A block's part in a panel's softmax. Its values are multiplied once, or where a maximum rises: before outputs shrink.
void attend(const AttentionForward& problem, const Head& head, Panel& panel, const KeyBlock& whole,
            const Workspace& work) {
  constexpr int64_t PART = ForwardProducts::PART;
  const AttentionShape& shape = problem.shape;
  const KeyRange range =
      seen_part(whole, head.sequence, panel.first_query, panel.first_query + PANEL, ForwardProducts::STEP);
  if (range.count <= 0) return;
  const KeyBlock block = whole.part(range, shape);
  const MaskBlock mask = load_mask(problem.rule, head.sequence, head.query_head, panel.first_query, panel.count,
                                   block.first, block.count, work.mask);
  if (mask.hides_all) return;
  const auto sight_of = [&](const KeyRange& part) {
    return Sight(head.sequence, panel.first_query, part, mask.part(part.first - block.first));
  };
  int64_t added = 0;  // keys whose values are
  const auto add_until = [&](int64_t end) {
    if (end == added) return;
    const KeyBlock part = block.part({block.first + added, end - added}, shape);
    work.products.add_values(added, part, shape, sight_of(part), work.scores, work.factors, panel.empty, panel.outputs);
    panel.empty = false;
    added = end;
  };
  for (int64_t first = 0; first < block.count; first += PART) {
    const KeyBlock part = block.part({block.first + first, smaller(PART, block.count - first)}, shape);
    score_part(problem, head, panel, part, sight_of(part), first, work);
    if (!ForwardProducts::shrink_first(work.factors)) continue;
    add_until(first);
    if (!panel.empty) ForwardProducts::shrink(work.factors, shape.value_dim, panel.outputs);
  }
  add_until(block.count);
}

template <class Format>
void start(const AttentionForward& problem, const Head& head, const Workspace& work, int64_t first_query, int64_t p,
           Panel& panel) {
  const AttentionShape& shape = problem.shape;
  const int64_t batch = head.sequence.batch, row = head.sequence.first_query + first_query;
  panel.number = p;
  panel.first_query = first_query;
  panel.count = smaller(head.sequence.queries - first_query, PANEL);
  panel.outputs = work.outputs + p * ForwardProducts::output_rows(shape.value_dim) * PANEL;
  panel.maxima = work.maxima + p * PANEL;
  panel.sums = work.sums + p * PANEL;
  panel.empty = true;
  work.products.pack_queries<Format>(p, row_of<typename Format::Element>(problem.query, batch, head.query_head, row),
                                     problem.query, panel.count, shape.head_dim, Scale(problem.rule).sign);
  const int64_t columns = Sight::vectors_of(panel.count) * LANES;
  const int64_t numbers = ForwardProducts::output_rows(shape.value_dim) * PANEL;
  for (int64_t i = 0; i < numbers; i += PANEL) {
    for (int64_t m = 0; m < columns; m += LANES) store(panel.outputs + i + m, Vector{});
  }
  for (int c = 0; c < PANEL_VECTORS; c++) {
    store(panel.maxima + c * LANES, broadcast(-INFINITE));
    store(panel.sums + c * LANES, Vector{});
  }
  if (problem.rule.dropout.threshold) {
    panel.rows.start(problem.rule.dropout, batch * shape.query_heads + head.query_head, row);
  }
}

// Divides by the sums and writes the panel's rows of output and logsumexp. A query that saw no key gives 0 and -inf.
template <class Format>
void finish(const AttentionForward& problem, const Head& head, const Panel& panel) {
  const AttentionShape& shape = problem.shape;
  const int64_t batch = head.sequence.batch, row = head.sequence.first_query + panel.first_query;
  float* logsumexp = problem.logsumexp + (batch * shape.query_heads + head.query_head) * shape.query_length + row;
  const float within = Scale(problem.rule).within;
  float factors[PANEL];
  for (int64_t m = 0; m < panel.count; m += LANES) {
    const Vector sums = load(panel.sums + m);
    store(factors + m, sums == 0.0f ? Vector{} : problem.rule.dropout.scale / sums);
    const Vector result = load(panel.maxima + m) * within + logarithm(sums);
    store_some<Float32>(logsumexp + m, result, smaller(LANES, panel.count - m));
  }
  unpack_panel<Format>(panel.outputs, factors, panel.count, shape.value_dim,
                       row_of<typename Format::Element>(problem.output, batch, head.query_head, row),
                       problem.output.row);
}

template <class Format>
void forward_tile(const AttentionForward& problem, const Head& head, int64_t first_query, int64_t most_panels) {
  const Workspace work(problem.shape);
  const UnitInUse unit;
  const Sequence& sequence = head.sequence;
  const int64_t panels = smaller(most_panels, ceiling(sequence.queries - first_query, PANEL));
  Panel panel[PANELS];
  for (int64_t p = 0; p < panels; p++) start<Format>(problem, head, work, first_query + p * PANEL, p, panel[p]);
  const int64_t end = sequence.end_seen(first_query + panels * PANEL);
  for (int64_t first = sequence.first_seen(first_query) / BLOCK * BLOCK; first < end; first += BLOCK) {
    const KeyBlock block =
        work.products.blocks.load_block<Format>(problem, sequence, head.key_head, first, smaller(end - first, BLOCK));
    for (int64_t p = 0; p < panels; p++) attend(problem, head, panel[p], block, work);
  }
  for (int64_t p = 0; p < panels; p++) finish<Format>(problem, head, panel[p]);
}

template <class Format>
void forward(const AttentionForward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const AttentionSequences& sequences = problem.sequences;
  const int64_t heads = shape.query_heads;
  const int64_t panels = panels_in_tile(shape.batch * heads, shape.query_length, threads.count);
  const Tiles tiles = {sequences.query_starts, sequences.count, shape.query_length, panels * PANEL};
  deal(heads * tiles.count(), threads, [&](int64_t task) {
    // Longest first: under a causal mask the last tile sees the most keys.
    const Tiles::Tile tile = tiles[tiles.count() - 1 - task / heads];
    const int64_t head = task % heads;
    const Sequence sequence(shape, sequences, problem.rule, tile.sequence);
    if (tile.first >= sequence.queries) return;
    forward_tile<Format>(problem, {sequence, head, head / (heads / shape.key_heads)}, tile.first, panels);
  });
  clear_unowned_queries<Format>(problem);
}

}  // namespace

void attention_forward(const AttentionForward& problem, const Threads& threads) {
  in_its_format(problem, threads, TRILBY_VECTOR_LEVEL::attention_forward,
                [&](auto format) { forward<decltype(format)>(problem, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
