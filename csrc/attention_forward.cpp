// Causal-softmax attention, forward, on one instruction-set level.
//
// The queries lie in the lanes: a panel of PANEL queries is transposed once, and then, block of keys by block of keys,
//     Sᵀ[n][m] = sum over d of K[n][d] · Qᵀ[d][m]       K is read element by element
//     Pᵀ[n][m] = 2^(Sᵀ[n][m] - max[m])                   online softmax, one query a lane: no horizontal reduction
//     Oᵀ[d][m] = Oᵀ[d][m] · 2^(old max - max) + sum over n of V[n][d] · Pᵀ[n][m]
// so that neither K nor V is ever transposed, and the T x S scores never exist.
//
// Operations: 2 · D + 2 · Dv flops and one exp2 (13 instructions for LANES scores) for each visible (query, key) pair; a
// panel sees keys in steps of one, so causal attention computes the triangle and at most PANEL / 2 keys a query more.
// Traffic: Q and O once; K and V once for every tile of PANEL · PANELS queries, from the nearest cache that holds them.
#include "level.h"
#include "pack.h"
#include "product.h"
#include "queue.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Two vectors of queries: with 8 rows of keys in the register tile, 16 chains of multiply-adds hide their latency
// (8 needed) and 10 loads feed 16 of them, inside the two loads a cycle that the processor does.
constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;
// Keys in a block: scores of a block (64 x PANEL floats, 8 KiB for AVX-512) stay in the first-level cache.
constexpr int64_t BLOCK = 64;
// Panels that share a block of packed keys and values.
constexpr int64_t PANELS = 4;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Where everything of one task lies in the thread's scratch memory.
struct Workspace {
  float *queries, *outputs, *maxima, *sums;  // of each panel: [D][PANEL], [Dv][PANEL], [PANEL], [PANEL]
  float *keys, *values, *scores, *factors;   // [BLOCK][D], [BLOCK][Dv], [BLOCK][PANEL], [PANEL]

  explicit Workspace(const AttentionShape& shape) {
    float* next = nullptr;
    place(next, shape);
    next = static_cast<float*>(thread_scratch(reinterpret_cast<size_t>(next)));
    place(next, shape);
  }

 private:
  static float* take(float*& next, int64_t floats) {
    float* mine = next;
    next += (floats + 15) / 16 * 16;
    return mine;
  }
  void place(float*& next, const AttentionShape& shape) {
    queries = take(next, PANELS * shape.head_dim * PANEL);
    outputs = take(next, PANELS * shape.value_dim * PANEL);
    maxima = take(next, PANELS * PANEL);
    sums = take(next, PANELS * PANEL);
    keys = take(next, BLOCK * shape.head_dim);
    values = take(next, BLOCK * shape.value_dim);
    scores = take(next, BLOCK * PANEL);
    factors = take(next, PANEL);
  }
};

// One panel of queries and what its online softmax has come to.
struct Panel {
  int64_t first_query;
  float *queries, *outputs, *maxima, *sums;
};

// A block of keys and values as packed rows.
struct KeyBlock {
  const float *keys, *values;
  int64_t first, count;
  bool finite;  // no NaN and no infinity among the values
};

// Hides from each lane the keys after its query; `shift` is the panel's first query minus the block's first key.
void mask_scores(float* scores, int64_t keys, int64_t shift) {
  for (int64_t n = shift > 0 ? shift : 0; n < keys; n++) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      float* row = scores + n * PANEL + c * LANES;
      const Vector query = lane_numbers() + static_cast<float>(c * LANES);
      store(row, query >= static_cast<float>(n - shift) ? load(row) : broadcast(-INFINITE));
    }
  }
}

// Turns scores into probabilities relative to the running maximum; leaves in `factors` what the old sums shrink by.
void online_softmax(float* scores, int64_t keys, float* maxima, float* sums, float* factors) {
  for (int c = 0; c < PANEL_VECTORS; c++) {
    float* column = scores + c * LANES;
    const Vector old_maximum = load(maxima + c * LANES);
    Vector maximum = old_maximum;
    for (int64_t n = 0; n < keys; n++) maximum = larger(load(column + n * PANEL), maximum);
    const Vector shift = maximum == -INFINITE ? Vector{} : maximum;  // nothing seen yet: -inf - 0, not -inf + inf
    Vector sum = {};
    for (int64_t n = 0; n < keys; n++) {
      const Vector probability = exp2_of_nonpositive(load(column + n * PANEL) - shift);
      store(column + n * PANEL, probability);
      sum += probability;
    }
    const Vector factor = exp2_of_nonpositive(old_maximum - shift);
    store(factors + c * LANES, factor);
    store(sums + c * LANES, load(sums + c * LANES) * factor + sum);
    store(maxima + c * LANES, maximum);
  }
}

void attend(const AttentionShape& shape, const Panel& panel, const KeyBlock& block, const Workspace& work) {
  const int64_t shift = panel.first_query - block.first;
  int64_t keys = block.count;
  if (shape.causal && shift + PANEL < keys) keys = shift + PANEL;
  if (keys <= 0) return;
  const bool diagonal = shape.causal && shift < keys - 1;
  const Operand key_rows = {block.keys, shape.head_dim, 1};
  product<PANEL_VECTORS, Start::zero>(keys, key_rows, panel.queries, PANEL, work.scores, PANEL, nullptr, shape.head_dim);
  if (diagonal) mask_scores(work.scores, keys, shift);
  online_softmax(work.scores, keys, panel.maxima, panel.sums, work.factors);
  const Operand value_columns = {block.values, 1, shape.value_dim};
  if (diagonal && !block.finite) {
    // 0 · NaN is NaN: a hidden value must not be multiplied at all.
    product<PANEL_VECTORS, Start::rescale, true>(shape.value_dim, value_columns, work.scores, PANEL, panel.outputs, PANEL,
                                                 work.factors, keys, shift);
  } else {
    product<PANEL_VECTORS, Start::rescale>(shape.value_dim, value_columns, work.scores, PANEL, panel.outputs, PANEL,
                                           work.factors, keys);
  }
}

void start(const Panel& panel, const AttentionShape& shape) {
  for (int64_t i = 0; i < shape.value_dim * PANEL; i += LANES) store(panel.outputs + i, Vector{});
  for (int c = 0; c < PANEL_VECTORS; c++) {
    store(panel.maxima + c * LANES, broadcast(-INFINITE));
    store(panel.sums + c * LANES, Vector{});
  }
}

// Divides by the sums and writes `queries` rows of the output and of logsumexp. A query that saw no key gives 0, -inf.
template <class Format>
void finish(const Panel& panel, int64_t queries, int64_t value_dim, typename Format::Element* output, int64_t row,
            float* logsumexp) {
  float inverse[PANEL];
  for (int m = 0; m < PANEL; m++) inverse[m] = panel.sums[m] == 0.0f ? 0.0f : 1.0f / panel.sums[m];
  for (int64_t m = 0; m < queries; m++) logsumexp[m] = (panel.maxima[m] + __builtin_log2f(panel.sums[m])) * LN_2;
  for (int64_t d = 0; d < value_dim; d++) {
    for (int c = 0; c < PANEL_VECTORS; c++) {
      float* at = panel.outputs + d * PANEL + c * LANES;
      store(at, load(at) * load(inverse + c * LANES));
    }
  }
  unpack_transposed<Format>(panel.outputs, PANEL, queries, value_dim, output, row);
}

template <class Format>
void forward_tile(const AttentionForward& problem, int64_t batch, int64_t head, int64_t first_query, int64_t panels) {
  using Element = typename Format::Element;
  const AttentionShape& shape = problem.shape;
  const Workspace work(shape);
  const int64_t key_head = head / (shape.query_heads / shape.key_heads);
  const Element* query = row_of<Element>(problem.query, batch, head, 0);
  const Element* key = row_of<Element>(problem.key, batch, key_head, 0);
  const Element* value = row_of<Element>(problem.value, batch, key_head, 0);

  Panel panel[PANELS];
  for (int64_t p = 0; p < panels; p++) {
    panel[p] = {first_query + p * PANEL, work.queries + p * shape.head_dim * PANEL,
                work.outputs + p * shape.value_dim * PANEL, work.maxima + p * PANEL, work.sums + p * PANEL};
    const int64_t rows = smaller(shape.query_length - panel[p].first_query, PANEL);
    pack_transposed<Format>(query + panel[p].first_query * problem.query.row, problem.query, rows, shape.head_dim,
                            shape.scale * LOG2_E, panel[p].queries, PANEL);
    start(panel[p], shape);
  }
  const int64_t visible = first_query + panels * PANEL;
  const int64_t end = shape.causal ? smaller(shape.key_length, visible) : shape.key_length;
  for (int64_t first = 0; first < end; first += BLOCK) {
    KeyBlock block = {work.keys, work.values, first, smaller(end - first, BLOCK), true};
    block.keys = packed_rows<Format>(key + first * problem.key.row, problem.key, block.count, shape.head_dim, work.keys);
    block.values =
        packed_rows<Format>(value + first * problem.value.row, problem.value, block.count, shape.value_dim, work.values);
    if (shape.causal && first + block.count > first_query) {
      block.finite = all_finite(block.values, block.count * shape.value_dim);
    }
    for (int64_t p = 0; p < panels; p++) attend(shape, panel[p], block, work);
  }
  for (int64_t p = 0; p < panels; p++) {
    const int64_t queries = smaller(shape.query_length - panel[p].first_query, PANEL);
    Element* output = row_of<Element>(problem.output, batch, head, panel[p].first_query);
    float* logsumexp =
        problem.logsumexp + (batch * shape.query_heads + head) * shape.query_length + panel[p].first_query;
    finish<Format>(panel[p], queries, shape.value_dim, output, problem.output.row, logsumexp);
  }
}

}  // namespace

void attention_forward(const AttentionForward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t heads = shape.batch * shape.query_heads;
  // Panels are dealt singly where there would be too few tiles to keep every thread busy to the end. A panel's own
  // arithmetic is the same either way.
  int64_t panels = PANELS;
  while (panels > 1 && heads * ceiling(shape.query_length, panels * PANEL) < 4 * threads.count) panels /= 2;
  const int64_t tiles = ceiling(shape.query_length, panels * PANEL);
  deal(heads * tiles, threads, [&](int64_t task) {
    // Longest first: under a causal mask the last tile sees the most keys.
    const int64_t tile = tiles - 1 - task / heads;
    const int64_t batch = task % heads / shape.query_heads, head = task % heads % shape.query_heads;
    const int64_t first_query = tile * panels * PANEL;
    const int64_t count = smaller(panels, ceiling(shape.query_length - first_query, PANEL));
    switch (shape.dtype) {
      case Dtype::float32: return forward_tile<Float32>(problem, batch, head, first_query, count);
      case Dtype::bfloat16: return forward_tile<BFloat16>(problem, batch, head, first_query, count);
      case Dtype::float16: return forward_tile<Float16>(problem, batch, head, first_query, count);
    }
  });
}

}  // namespace trilby::TRILBY_LEVEL
