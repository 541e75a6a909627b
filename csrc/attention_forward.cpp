// Causal-softmax attention, forward, on one instruction-set level.
//
// The queries lie in the lanes: a panel of PANEL queries is transposed once, and then, block of keys by block of keys,
//     Sᵀ[n][m] = sum over d of K[n][d] · Qᵀ[d][m]       K is read element by element
//     Pᵀ[n][m] = 2^((Sᵀ[n][m] - max[m]) · c)             online softmax, one query a lane: no horizontal reduction
//     Oᵀ[d][m] = Oᵀ[d][m] · 2^((old max - max) · c) + sum over n of V[n][d] · Pᵀ[n][m]
// with c = |scale| · log2(e), so that neither K nor V is ever transposed, and the T x S scores never exist. Differences
// are taken before they are scaled: scores of 10^5, scaled first, would be off by 0.01.
//
// Operations: 2 · D + 2 · Dv flops and one exp2 (15 instructions for LANES scores) for each visible (query, key) pair,
// and for at most PANEL / 2 hidden keys a query on the diagonal.
// Traffic: Q and O once; K and V once for every PANELS · PANEL queries, from the nearest cache that holds them.
#include "level.h"
#include "panel.h"

namespace trilby::TRILBY_LEVEL {

namespace {

struct Workspace {
  float *queries, *outputs, *maxima, *sums;  // of PANELS panels: [D][PANEL], [Dv][PANEL], [PANEL], [PANEL]
  float *keys, *values, *scores, *factors;   // [BLOCK][D], [BLOCK][Dv], [BLOCK][PANEL], [PANEL]

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
  }
};

// The scale in two parts: the maximum is taken over scores times its sign. A scale of 0 is all sign: -inf · 0, of a
// hidden score, must not become a NaN.
struct Scale {
  float sign, size;

  explicit Scale(const AttentionRule& rule)
      : sign(rule.scale == 0.0f ? 0.0f : __builtin_copysignf(1.0f, rule.scale)),
        size(rule.scale == 0.0f ? 1.0f : __builtin_fabsf(rule.scale)) {}
};

// One panel of queries and what its online softmax has come to.
struct Panel {
  int64_t first_query, count;
  float *queries, *outputs, *maxima, *sums;
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

void attend(const AttentionForward& problem, const Panel& panel, const KeyBlock& block, const Workspace& work) {
  const AttentionShape& shape = problem.shape;
  const Sight sight(problem.rule, panel.first_query, block);
  if (sight.keys <= 0) return;
  const Operand keys = {block.keys, shape.head_dim, 1};
  product<PANEL_VECTORS, Start::zero>(sight.keys, keys, panel.queries, PANEL, work.scores, PANEL, nullptr,
                                      shape.head_dim);
  if (sight.diagonal) hide(work.scores, sight, -INFINITE);
  online_softmax(work.scores, sight.keys, Scale(problem.rule).size * LOG2_E, panel.maxima, panel.sums, work.factors);
  const Operand values = {block.values, 1, shape.value_dim};
  if (!zero_hides(sight, block.values, shape.value_dim)) {
    product<PANEL_VECTORS, Start::rescale, true>(shape.value_dim, values, work.scores, PANEL, panel.outputs, PANEL,
                                                 work.factors, sight.keys, sight.shift);
  } else {
    product<PANEL_VECTORS, Start::rescale>(shape.value_dim, values, work.scores, PANEL, panel.outputs, PANEL,
                                           work.factors, sight.keys);
  }
}

template <class Format>
Panel start(const AttentionForward& problem, const Workspace& work, int64_t batch, int64_t head, int64_t first_query,
            int64_t p) {
  const AttentionShape& shape = problem.shape;
  const Panel panel = {first_query + p * PANEL,
                       smaller(shape.query_length - (first_query + p * PANEL), PANEL),
                       work.queries + p * shape.head_dim * PANEL,
                       work.outputs + p * shape.value_dim * PANEL,
                       work.maxima + p * PANEL,
                       work.sums + p * PANEL};
  pack_transposed<Format>(row_of<typename Format::Element>(problem.query, batch, head, panel.first_query),
                          problem.query, panel.count, shape.head_dim, Scale(problem.rule).sign, panel.queries, PANEL);
  for (int64_t i = 0; i < shape.value_dim * PANEL; i += LANES) store(panel.outputs + i, Vector{});
  for (int c = 0; c < PANEL_VECTORS; c++) {
    store(panel.maxima + c * LANES, broadcast(-INFINITE));
    store(panel.sums + c * LANES, Vector{});
  }
  return panel;
}

// Divides by the sums and writes the panel's rows of output and logsumexp. A query that saw no key gives 0 and -inf.
template <class Format>
void finish(const AttentionForward& problem, const Panel& panel, int64_t batch, int64_t head) {
  const AttentionShape& shape = problem.shape;
  float* logsumexp = problem.logsumexp + (batch * shape.query_heads + head) * shape.query_length + panel.first_query;
  const float size = Scale(problem.rule).size;
  float inverse[PANEL];
  for (int64_t m = 0; m < PANEL; m++) inverse[m] = panel.sums[m] == 0.0f ? 0.0f : 1.0f / panel.sums[m];
  for (int64_t m = 0; m < panel.count; m++) {
    logsumexp[m] = panel.maxima[m] * size + __builtin_logf(panel.sums[m]);
  }
  unpack_transposed<Format>(panel.outputs, PANEL, inverse, panel.count, shape.value_dim,
                            row_of<typename Format::Element>(problem.output, batch, head, panel.first_query),
                            problem.output.row);
}

template <class Format>
void forward_tile(const AttentionForward& problem, int64_t batch, int64_t head, int64_t first_query, int64_t panels) {
  const AttentionShape& shape = problem.shape;
  const Workspace work(shape);
  const int64_t key_head = head / (shape.query_heads / shape.key_heads);
  Panel panel[PANELS];
  for (int64_t p = 0; p < panels; p++) panel[p] = start<Format>(problem, work, batch, head, first_query, p);
  const int64_t visible = first_query + panels * PANEL;
  const int64_t end = problem.rule.window_right == 0 ? smaller(shape.key_length, visible) : shape.key_length;
  for (int64_t first = 0; first < end; first += BLOCK) {
    const KeyBlock block = load_block<Format>(shape, problem.key, problem.value, batch, key_head, first,
                                              smaller(end - first, BLOCK), work.keys, work.values);
    for (int64_t p = 0; p < panels; p++) attend(problem, panel[p], block, work);
  }
  for (int64_t p = 0; p < panels; p++) finish<Format>(problem, panel[p], batch, head);
}

}  // namespace

void attention_forward(const AttentionForward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t heads = shape.batch * shape.query_heads;
  const int64_t panels = panels_in_tile(heads, shape.query_length, threads.count);
  const int64_t tiles = ceiling(shape.query_length, panels * PANEL);
  deal(heads * tiles, threads, [&](int64_t task) {
    // Longest first: under a causal mask the last tile sees the most keys.
    const int64_t first_query = (tiles - 1 - task / heads) * panels * PANEL;
    const int64_t batch = task % heads / shape.query_heads, head = task % heads % shape.query_heads;
    const int64_t count = smaller(panels, ceiling(shape.query_length - first_query, PANEL));
    switch (shape.dtype) {
      case Dtype::float32: return forward_tile<Float32>(problem, batch, head, first_query, count);
      case Dtype::bfloat16: return forward_tile<BFloat16>(problem, batch, head, first_query, count);
      case Dtype::float16: return forward_tile<Float16>(problem, batch, head, first_query, count);
    }
  });
}

}  // namespace trilby::TRILBY_LEVEL
