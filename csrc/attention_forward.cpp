// Attention, forward, on one instruction-set level.
//
// The queries lie in the lanes: a panel of PANEL queries is transposed once, and then, block of keys by block of keys,
//     Sᵀ[n][m] = sum over d of K[n][d] · Qᵀ[d][m]       K is read element by element
//     Pᵀ[n][m] = 2^((Sᵀ[n][m] - max[m]) · c)             online softmax, one query a lane: no horizontal reduction
//     Oᵀ[d][m] = Oᵀ[d][m] · 2^((old max - max) · c) + sum over n of V[n][d] · Pᵀ[n][m]
// with c = |scale| · log2(e), so that neither K nor V is ever transposed, and the T x S scores never exist. Differences
// are taken before they are scaled: scores of 10^5, scaled first, would be off by 0.01.
//
// Operations: 2 · D + 2 · Dv flops and one exp2 (15 instructions for LANES scores) for each visible (query, key) pair,
// and for at most PANEL / 2 hidden keys a query at each edge of what it sees. For LANES scores, beside that: dropout 17
// instructions, softcap 25, ALiBi 6, a mask 10 (6 of them its transposition).
// Traffic: Q and O once; K and V once for every PANELS · PANEL queries, from the nearest cache that holds them.
#include "attention_forward.h"

#include "attention_dropout.h"
#include "level.h"
#include "product.h"

namespace trilby::TRILBY_LEVEL {

namespace {

struct Workspace {
  float *queries, *outputs, *maxima, *sums;  // of PANELS panels: [D][PANEL], [Dv][PANEL], [PANEL], [PANEL]
  float *keys, *values, *scores, *factors;   // [BLOCK][D], [BLOCK][Dv], [BLOCK][PANEL], [PANEL]
  float *mask, *seen;                        // [BLOCK][PANEL]

  explicit Workspace(const AttentionShape& shape) {
    Carver carver;
    place(carver, shape);
    carver.allocate();
    place(carver, shape);
  }

 private:
  void place(Carver& carver, const AttentionShape& shape) {
    queries = carver.take(PANELS * shape.head_dim * PANEL);
    outputs = carver.take(PANELS * shape.value_dim * PANEL);
    maxima = carver.take(PANELS * PANEL);
    sums = carver.take(PANELS * PANEL);
    keys = carver.take(BLOCK * shape.head_dim);
    values = carver.take(BLOCK * shape.value_dim);
    scores = carver.take(BLOCK * PANEL);
    factors = carver.take(PANEL);
    mask = carver.take(BLOCK * PANEL);
    seen = carver.take(BLOCK * PANEL);
  }
};

// One head of one sequence.
struct Head {
  Sequence sequence;
  int64_t query_head, key_head;
};

// One panel of queries and what its online softmax has come to.
struct Panel {
  int64_t first_query, count;
  float *queries, *outputs, *maxima, *sums;
  DropoutRows rows;
};

// Turns scores into probabilities relative to the running maximum; leaves in `factors` what the old sums shrink by. The
// vectors of a panel take turns key by key: one alone would wait for its own maximum.
void online_softmax(float* scores, int64_t keys, float scale, float* maxima, float* sums, float* factors) {
  Vector maximum[PANEL_VECTORS], shift[PANEL_VECTORS], sum[PANEL_VECTORS] = {};
  for (int c = 0; c < PANEL_VECTORS; c++) maximum[c] = load(maxima + c * LANES);
  for (int64_t n = 0; n < keys; n++) {
    for (int c = 0; c < PANEL_VECTORS; c++) maximum[c] = larger(load(scores + n * PANEL + c * LANES), maximum[c]);
  }
  // Nothing seen yet: -inf - 0, not -inf + inf.
  for (int c = 0; c < PANEL_VECTORS; c++) shift[c] = maximum[c] == -INFINITE ? Vector{} : maximum[c];
  for (int64_t n = 0; n < keys; n++) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      float* score = scores + n * PANEL + c * LANES;
      const Vector probability = exp2_of_nonpositive((load(score) - shift[c]) * scale);
      store(score, probability);
      sum[c] += probability;
    }
  }
  for (int c = 0; c < PANEL_VECTORS; c++) {
    const Vector factor = exp2_of_nonpositive((load(maxima + c * LANES) - shift[c]) * scale);
    store(factors + c * LANES, factor);
    store(sums + c * LANES, load(sums + c * LANES) * factor + sum[c]);
    store(maxima + c * LANES, maximum[c]);
  }
}

void attend(const AttentionForward& problem, const Head& head, const Panel& panel, const KeyBlock& whole,
            const Workspace& work) {
  const AttentionShape& shape = problem.shape;
  const AttentionRule& rule = problem.rule;
  const KeyBlock block = seen_part(whole, shape, head.sequence, panel.first_query, panel.first_query + PANEL);
  if (block.count <= 0) return;
  Sight sight(head.sequence, panel.first_query, block);
  sight.mask = load_mask(rule, head.sequence, head.query_head, panel.first_query, panel.count, block.first, block.count,
                         work.mask);
  if (sight.mask.hides_all) return;
  const Scale scale(rule);
  const Operand keys = {block.keys, shape.head_dim, 1};
  product<PANEL_VECTORS, Start::zero>(block.count, keys, panel.queries, PANEL, work.scores, PANEL, nullptr,
                                      shape.head_dim);
  if (adjusts(rule)) {
    adjust(rule, scale.size, head.sequence, head.query_head, sight, block.count, work.scores, nullptr);
  }
  if (sight.hides(block)) hide(work.scores, block.count, sight, -INFINITE);
  online_softmax(work.scores, block.count, scale.within * LOG2_E, panel.maxima, panel.sums, work.factors);
  if (rule.dropout.threshold) drop(rule.dropout, panel.rows, block.first, block.count, work.scores);
  const Operand values = {block.values, 1, shape.value_dim};
  if (!zero_hides(sight, block.values, block.count, shape.value_dim)) {
    product<PANEL_VECTORS, Start::rescale, true>(shape.value_dim, values, work.scores, PANEL, panel.outputs, PANEL,
                                                 work.factors, block.count, seen_pairs(sight, block.count, work.seen));
  } else {
    product<PANEL_VECTORS, Start::rescale>(shape.value_dim, values, work.scores, PANEL, panel.outputs, PANEL,
                                           work.factors, block.count);
  }
}

template <class Format>
void start(const AttentionForward& problem, const Head& head, const Workspace& work, int64_t first_query, int64_t p,
           Panel& panel) {
  const AttentionShape& shape = problem.shape;
  const int64_t batch = head.sequence.batch, row = head.sequence.first_query + first_query;
  panel.first_query = first_query;
  panel.count = smaller(head.sequence.queries - first_query, PANEL);
  panel.queries = work.queries + p * shape.head_dim * PANEL;
  panel.outputs = work.outputs + p * shape.value_dim * PANEL;
  panel.maxima = work.maxima + p * PANEL;
  panel.sums = work.sums + p * PANEL;
  pack_transposed<Format>(row_of<typename Format::Element>(problem.query, batch, head.query_head, row), problem.query,
                          panel.count, shape.head_dim, Scale(problem.rule).sign, panel.queries, PANEL);
  for (int64_t i = 0; i < shape.value_dim * PANEL; i += LANES) store(panel.outputs + i, Vector{});
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
  for (int64_t m = 0; m < PANEL; m++) {
    factors[m] = panel.sums[m] == 0.0f ? 0.0f : problem.rule.dropout.scale / panel.sums[m];
  }
  for (int64_t m = 0; m < panel.count; m++) {
    logsumexp[m] = panel.maxima[m] * within + __builtin_logf(panel.sums[m]);
  }
  unpack_transposed<Format>(panel.outputs, PANEL, factors, panel.count, shape.value_dim,
                            row_of<typename Format::Element>(problem.output, batch, head.query_head, row),
                            problem.output.row);
}

template <class Format>
void forward_tile(const AttentionForward& problem, const Head& head, int64_t first_query, int64_t most_panels) {
  const Workspace work(problem.shape);
  const Sequence& sequence = head.sequence;
  const int64_t panels = smaller(most_panels, ceiling(sequence.queries - first_query, PANEL));
  Panel panel[PANELS];
  for (int64_t p = 0; p < panels; p++) start<Format>(problem, head, work, first_query + p * PANEL, p, panel[p]);
  const int64_t end = sequence.end_seen(first_query + panels * PANEL);
  for (int64_t first = sequence.first_seen(first_query) / BLOCK * BLOCK; first < end; first += BLOCK) {
    const KeyBlock block = load_block<Format>(problem, sequence, head.key_head, first, smaller(end - first, BLOCK),
                                              work.keys, work.values);
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
  switch (problem.shape.dtype) {
    case Dtype::float32: return forward<Float32>(problem, threads);
    case Dtype::bfloat16: return forward<BFloat16>(problem, threads);
    case Dtype::float16: return forward<Float16>(problem, threads);
  }
}

}  // namespace trilby::TRILBY_LEVEL
