// Causal-softmax attention, backward, on one instruction-set level.
//
// As in the forward, a panel of queries lies in the lanes. For every block of keys that it sees,
//     Sᵀ[n][m]  = sum over d of K[n][d] · Qᵀ[d][m]         Pᵀ = 2^((Sᵀ · scale - logsumexp[m]) · log2(e))
//     dPᵀ[n][m] = sum over d of V[n][d] · dOᵀ[d][m]        dSᵀ = Pᵀ · (dPᵀ - delta[m]),  delta = rowsum(dO · O)
//     dQᵀ[d][m] += sum over n of K[n][d] · dSᵀ[n][m]
//     dV[n][d]  += sum over m of Pᵀ[n][m] · dO[m][d]
//     dK[n][d]  += sum over m of dSᵀ[n][m] · Q[m][d]
// all in float32: five products, 10 · D flops for each visible pair, and one exp2.
//
// One pass over a head makes all three gradients, with dK and dV of the whole head in scratch memory. Where there are
// too few heads for the threads, or the head is too long for the scratch, two passes split the sequence: dQ by tiles of
// queries (three products), dK and dV by tiles of keys (four). Every sum is taken over the same terms in the same order
// in both, so that the result is the same, bit for bit, for any number of threads.
#include "level.h"
#include "panel.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Keys whose dK and dV one task of the second pass keeps: packing a panel of queries costs each block a quarter.
constexpr int64_t KEY_TILE = 4 * BLOCK;
// The most scratch memory that dK and dV of one head may take for the single pass, in floats: 8 MiB a thread.
constexpr int64_t LONGEST_PASS = 2 * 1024 * 1024;

int64_t whole_vectors(int64_t columns) { return ceiling(columns, LANES) * LANES; }

// One panel of queries. Lanes past the last query hold zeros and a logsumexp of infinity: their probabilities are 0.
struct Panel {
  int64_t first_query, count;
  float *queries_transposed, *grads_transposed, *grad_queries;  // [D][PANEL], [Dv][PANEL], [D][PANEL]
  float *queries, *grads;                                       // [PANEL][D], [PANEL][Dv], in whole vectors
  float *logsumexp, *delta;                                     // [PANEL]
};

struct Workspace {
  Panel panel[PANELS];
  float *keys, *values;                // [BLOCK][D], [BLOCK][Dv]
  float *probabilities, *grad_scores;  // [BLOCK][PANEL]
  float *grad_keys, *grad_values;      // [gradient rows][D], [gradient rows][Dv], in whole vectors
  float* output_transposed;            // [Dv][PANEL]

  Workspace(const AttentionShape& shape, int64_t gradient_rows) {
    Carver carver;
    place(carver, shape, gradient_rows);
    carver.allocate();
    place(carver, shape, gradient_rows);
  }

 private:
  void place(Carver& carver, const AttentionShape& shape, int64_t gradient_rows) {
    const int64_t D = shape.head_dim, Dv = shape.value_dim;
    for (Panel& mine : panel) {
      mine.queries_transposed = carver.take(D * PANEL);
      mine.grads_transposed = carver.take(Dv * PANEL);
      mine.grad_queries = carver.take(D * PANEL);
      mine.queries = carver.take(PANEL * whole_vectors(D));
      mine.grads = carver.take(PANEL * whole_vectors(Dv));
      mine.logsumexp = carver.take(PANEL);
      mine.delta = carver.take(PANEL);
    }
    keys = carver.take(BLOCK * D);
    values = carver.take(BLOCK * Dv);
    probabilities = carver.take(BLOCK * PANEL);
    grad_scores = carver.take(BLOCK * PANEL);
    grad_keys = carver.take(gradient_rows * whole_vectors(D));
    grad_values = carver.take(gradient_rows * whole_vectors(Dv));
    output_transposed = carver.take(Dv * PANEL);
  }
};

// Which gradients a pass makes.
enum class Wanted { all, query, key_and_value };

struct Head {
  int64_t batch, query_head, key_head;
};

void clear(float* floats, int64_t count) { __builtin_memset(floats, 0, static_cast<size_t>(count) * sizeof(float)); }

// `rows` rows of `columns` elements as floats, `width` apart, with zeros after each and in the rest of the panel.
template <class Format>
void pack_padded(const typename Format::Element* from, const View& view, int64_t rows, int64_t columns, int64_t width,
                 float* to) {
  clear(to, PANEL * width);
  for (int64_t m = 0; m < rows; m++) unpack_row<Format>(from + m * view.row, view.column, columns, to + m * width);
}

// delta[m] = sum over d of dO[m][d] · O[m][d], term by term in the order in which the products sum dP: a query that
// sees one key, whose output is that key's value, then has a dS of exactly 0.
void sum_columns_of_product(const float* a, const float* b, int64_t rows, float* sums) {
  for (int c = 0; c < PANEL; c += LANES) {
    Vector sum = {};
    for (int64_t d = 0; d < rows; d++) sum += load(a + d * PANEL + c) * load(b + d * PANEL + c);
    store(sums + c, sum);
  }
}

template <class Format>
void load_panel(const AttentionBackward& problem, const Head& head, int64_t first_query, const Workspace& work,
                Panel& panel) {
  using Element = typename Format::Element;
  const AttentionShape& shape = problem.shape;
  const int64_t D = shape.head_dim, Dv = shape.value_dim;
  panel.first_query = first_query;
  panel.count = smaller(shape.query_length - first_query, PANEL);
  const Element* query = row_of<Element>(problem.query, head.batch, head.query_head, first_query);
  const Element* grad = row_of<Element>(problem.grad_output, head.batch, head.query_head, first_query);
  const Element* output = row_of<Element>(problem.output, head.batch, head.query_head, first_query);
  pack_transposed<Format>(query, problem.query, panel.count, D, 1.0f, panel.queries_transposed, PANEL);
  pack_transposed<Format>(grad, problem.grad_output, panel.count, Dv, 1.0f, panel.grads_transposed, PANEL);
  pack_padded<Format>(query, problem.query, panel.count, D, whole_vectors(D), panel.queries);
  pack_padded<Format>(grad, problem.grad_output, panel.count, Dv, whole_vectors(Dv), panel.grads);
  const float* logsumexp =
      problem.logsumexp + (head.batch * shape.query_heads + head.query_head) * shape.query_length + first_query;
  for (int64_t m = 0; m < PANEL; m++) {
    panel.logsumexp[m] = m < panel.count ? logsumexp[m] : INFINITE;
    if (panel.logsumexp[m] == -INFINITE) panel.logsumexp[m] = 0.0f;  // every score was -inf: 2^(-inf - 0)
  }
  pack_transposed<Format>(output, problem.output, panel.count, Dv, 1.0f, work.output_transposed, PANEL);
  sum_columns_of_product(work.output_transposed, panel.grads_transposed, Dv, panel.delta);
  clear(panel.grad_queries, D * PANEL);
}

// Scores to probabilities, their gradients to the scores' gradients, both [keys][PANEL] in place.
void softmax_backward(float* probabilities, float* grad_scores, int64_t keys, float scale, const Panel& panel) {
  for (int c = 0; c < PANEL_VECTORS; c++) {
    const Vector logsumexp = load(panel.logsumexp + c * LANES), delta = load(panel.delta + c * LANES);
    for (int64_t at = c * LANES; at < keys * PANEL; at += PANEL) {
      const Vector probability = exp2_of_nonpositive((load(probabilities + at) * scale - logsumexp) * LOG2_E);
      store(probabilities + at, probability);
      store(grad_scores + at, probability * (load(grad_scores + at) - delta));
    }
  }
}

// gradient[n][d] += sum over m of weights[n][m] · rows[m][d].
void accumulate(float* gradient, int64_t keys, const float* weights, const float* rows, int64_t width) {
  const Operand by_key = {weights, PANEL, 1};
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    product<2, Start::resume>(keys, by_key, rows + d, width, gradient + d, width, nullptr, PANEL);
  }
  if (d < width) product<1, Start::resume>(keys, by_key, rows + d, width, gradient + d, width, nullptr, PANEL);
}

void back_propagate(const AttentionBackward& problem, const Panel& panel, const KeyBlock& block, const Workspace& work,
                    Wanted wanted, float* grad_keys, float* grad_values) {
  const AttentionShape& shape = problem.shape;
  const Sight sight(problem.rule, panel.first_query, block);
  if (sight.keys <= 0) return;
  const int64_t D = shape.head_dim, Dv = shape.value_dim;
  product<PANEL_VECTORS, Start::zero>(sight.keys, {block.keys, D, 1}, panel.queries_transposed, PANEL,
                                      work.probabilities, PANEL, nullptr, D);
  product<PANEL_VECTORS, Start::zero>(sight.keys, {block.values, Dv, 1}, panel.grads_transposed, PANEL,
                                      work.grad_scores, PANEL, nullptr, Dv);
  softmax_backward(work.probabilities, work.grad_scores, sight.keys, problem.rule.scale, panel);
  if (sight.diagonal) {
    hide(work.probabilities, sight, 0.0f);
    hide(work.grad_scores, sight, 0.0f);
  }
  if (wanted != Wanted::key_and_value) {
    const Operand keys = {block.keys, 1, D};
    if (!zero_hides(sight, block.keys, D)) {
      product<PANEL_VECTORS, Start::resume, true>(D, keys, work.grad_scores, PANEL, panel.grad_queries, PANEL, nullptr,
                                                  sight.keys, sight.shift);
    } else {
      product<PANEL_VECTORS, Start::resume>(D, keys, work.grad_scores, PANEL, panel.grad_queries, PANEL, nullptr,
                                            sight.keys);
    }
  }
  if (wanted != Wanted::query) {
    accumulate(grad_values, sight.keys, work.probabilities, panel.grads, whole_vectors(Dv));
    accumulate(grad_keys, sight.keys, work.grad_scores, panel.queries, whole_vectors(D));
  }
}

// One tile of queries against the keys [first_key, end_key), whose gradients start at work.grad_keys, work.grad_values.
template <class Format>
void backward_tile(const AttentionBackward& problem, const Head& head, int64_t first_query, int64_t panels,
                   int64_t first_key, int64_t end_key, Wanted wanted, Workspace& work) {
  const AttentionShape& shape = problem.shape;
  for (int64_t p = 0; p < panels; p++) {
    load_panel<Format>(problem, head, first_query + p * PANEL, work, work.panel[p]);
  }
  const int64_t visible = first_query + panels * PANEL;
  const int64_t end = problem.rule.window_right == 0 ? smaller(end_key, visible) : end_key;
  for (int64_t first = first_key; first < end; first += BLOCK) {
    const KeyBlock block = load_block<Format>(shape, problem.key, problem.value, head.batch, head.key_head, first,
                                              smaller(end - first, BLOCK), work.keys, work.values);
    float* grad_keys = work.grad_keys + (first - first_key) * whole_vectors(shape.head_dim);
    float* grad_values = work.grad_values + (first - first_key) * whole_vectors(shape.value_dim);
    for (int64_t p = 0; p < panels; p++) {
      back_propagate(problem, work.panel[p], block, work, wanted, grad_keys, grad_values);
    }
  }
  if (wanted == Wanted::key_and_value) return;
  float scales[PANEL];
  for (float& scale : scales) scale = problem.rule.scale;
  for (int64_t p = 0; p < panels; p++) {
    const Panel& panel = work.panel[p];
    unpack_transposed<Format>(
        panel.grad_queries, PANEL, scales, panel.count, shape.head_dim,
        row_of<typename Format::Element>(problem.grad_query, head.batch, head.query_head, panel.first_query),
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

// Everything that queries from `first_query` on give to the keys [first_key, end_key) of one head of keys.
template <class Format>
void backward_keys(const AttentionBackward& problem, int64_t batch, int64_t key_head, int64_t first_query,
                   int64_t first_key, int64_t end_key, Wanted wanted) {
  const AttentionShape& shape = problem.shape;
  const int64_t keys = end_key - first_key, group = shape.query_heads / shape.key_heads;
  Workspace work(shape, keys);
  clear(work.grad_keys, keys * whole_vectors(shape.head_dim));
  clear(work.grad_values, keys * whole_vectors(shape.value_dim));
  for (int64_t query_head = key_head * group; query_head < (key_head + 1) * group; query_head++) {
    for (int64_t query = first_query; query < shape.query_length; query += PANELS * PANEL) {
      const int64_t panels = smaller(PANELS, ceiling(shape.query_length - query, PANEL));
      backward_tile<Format>(problem, {batch, query_head, key_head}, query, panels, first_key, end_key, wanted, work);
    }
  }
  using Element = typename Format::Element;
  write_rows<Format>(work.grad_keys, keys, shape.head_dim, problem.rule.scale,
                     row_of<Element>(problem.grad_key, batch, key_head, first_key), problem.grad_key.row);
  write_rows<Format>(work.grad_values, keys, shape.value_dim, 1.0f,
                     row_of<Element>(problem.grad_value, batch, key_head, first_key), problem.grad_value.row);
}

template <class Format>
void backward(const AttentionBackward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t heads = shape.batch * shape.query_heads, key_heads = shape.batch * shape.key_heads;
  const int64_t floats_of_keys = shape.key_length * (whole_vectors(shape.head_dim) + whole_vectors(shape.value_dim));
  // Five products on as many threads as there are heads, or seven on all of them.
  const bool single_pass = 5 * ceiling(key_heads, threads.count) * threads.count <= 7 * key_heads;
  if (single_pass && floats_of_keys <= LONGEST_PASS) {
    deal(key_heads, threads, [&](int64_t task) {
      backward_keys<Format>(problem, task / shape.key_heads, task % shape.key_heads, 0, 0, shape.key_length,
                            Wanted::all);
    });
    return;
  }
  const int64_t panels = panels_in_tile(heads, shape.query_length, threads.count);
  const int64_t query_tiles = ceiling(shape.query_length, panels * PANEL);
  deal(heads * query_tiles, threads, [&](int64_t task) {
    const int64_t first_query = (query_tiles - 1 - task / heads) * panels * PANEL;
    const int64_t batch = task % heads / shape.query_heads, head = task % heads % shape.query_heads;
    const int64_t count = smaller(panels, ceiling(shape.query_length - first_query, PANEL));
    Workspace work(shape, 0);
    backward_tile<Format>(problem, {batch, head, head / (shape.query_heads / shape.key_heads)}, first_query, count, 0,
                          shape.key_length, Wanted::query, work);
  });
  const int64_t key_tiles = ceiling(shape.key_length, KEY_TILE);
  deal(key_heads * key_tiles, threads, [&](int64_t task) {
    // Longest first: under a causal mask the first keys are seen by the most queries, the others by none before them.
    const int64_t first_key = task / key_heads * KEY_TILE;
    const int64_t first_query = problem.rule.window_right == 0 ? first_key / (PANELS * PANEL) * (PANELS * PANEL) : 0;
    backward_keys<Format>(problem, task % key_heads / shape.key_heads, task % key_heads % shape.key_heads, first_query,
                          first_key, smaller(first_key + KEY_TILE, shape.key_length), Wanted::key_and_value);
  });
}

}  // namespace

void attention_backward(const AttentionBackward& problem, const Threads& threads) {
  switch (problem.shape.dtype) {
    case Dtype::float32: return backward<Float32>(problem, threads);
    case Dtype::bfloat16: return backward<BFloat16>(problem, threads);
    case Dtype::float16: return backward<Float16>(problem, threads);
  }
}

}  // namespace trilby::TRILBY_LEVEL
