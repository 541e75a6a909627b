// The probabilities of attention themselves, of each head or their mean over the heads, on one instruction-set level:
// what `nn.MultiheadAttention` returns beside its output. From the scores, computed anew, and the forward's logsumexp:
//     P[i][j] = 2^((q_i · k_j · scale - logsumexp[i]) · log2(e))
// A block of scores is a panel of queries in the lanes and a block of keys, as in the forward, and heads are added up
// where it lies in the cache: their mean takes T · S numbers, not H · T · S.
//
// Operations: 2 · D flops and one exp2 for each pair and head. Traffic: weights once; queries and keys once for each
// block and panel, from the cache.
#include "attention_forward.h"
#include "attention_products.h"
#include "level.h"

namespace trilby::TRILBY_LEVEL {

namespace {

struct Workspace {
  ForwardProducts products;
  float *scores, *sums, *mask;  // [BLOCK][PANEL]

  explicit Workspace(const AttentionShape& shape) {
    carve([&](Carver& carver) { place(carver, shape); });
  }

 private:
  void place(Carver& carver, const AttentionShape& shape) {
    products.place(carver, shape);
    scores = carver.take(BLOCK * PANEL);
    sums = carver.take(BLOCK * PANEL);
    mask = carver.take(BLOCK * PANEL);
  }
};

// Scores of a panel to probabilities, added to work.sums. A query that sees no key has a logsumexp of -inf, and gets 0.
void add_probabilities(const AttentionWeights& problem, const Sight& sight, const float* logsumexp, int64_t queries,
                       const KeyRange& block, const Workspace& work) {
  for (int64_t c = 0; c < sight.vectors; c++) {
    const int64_t m = c * LANES;
    const Vector given = m < queries ? load_some<Float32>(logsumexp + m, smaller(LANES, queries - m)) : Vector{};
    const Vector shift = given == -INFINITE ? Vector{} : given;
    for (int64_t at = m; at < block.count * PANEL; at += PANEL) {
      store(work.scores + at, exp2_of_nonpositive((load(work.scores + at) * problem.rule.scale - shift) * LOG2_E));
    }
  }
  if (sight.hides(block)) hide(work.scores, sight, 0.0f);
  for (int64_t i = 0; i < block.count * PANEL; i += PANEL) {
    for (int64_t m = i; m < i + sight.vectors * LANES; m += LANES) {
      store(work.sums + m, load(work.sums + m) + load(work.scores + m));
    }
  }
}

// The queries from first_query on that make a panel, and the mean over the heads [first_head, end_head).
template <class Format>
void weigh(const AttentionWeights& problem, int64_t batch, int64_t first_head, int64_t end_head, int64_t first_query) {
  using Element = typename Format::Element;
  const AttentionShape& shape = problem.shape;
  const Sequence sequence(shape, {shape.batch}, problem.rule, batch);
  const Workspace work(shape);
  const UnitInUse unit;
  const int64_t queries = smaller(shape.query_length - first_query, PANEL);
  float shares[PANEL];
  for (float& share : shares) share = 1.0f / static_cast<float>(end_head - first_head);
  for (int64_t first = 0; first < shape.key_length; first += BLOCK) {
    const KeyRange block = {first, smaller(BLOCK, shape.key_length - first)};
    for (int64_t i = 0; i < block.count * PANEL; i += LANES) store(work.sums + i, Vector{});
    for (int64_t head = first_head; head < end_head; head++) {
      const Sight sight(
          sequence, first_query, block,
          load_mask(problem.rule, sequence, head, first_query, queries, block.first, block.count, work.mask));
      if (sight.mask.hides_all) continue;
      work.products.pack_queries<Format>(0, row_of<const Element>(problem.query, batch, head, first_query),
                                         problem.query, queries, shape.head_dim, 1.0f);
      const KeyBlock keys = work.products.blocks.load_keys<Format>(problem, sequence, head, block);
      work.products.scores(0, keys, shape, sight, work.scores);
      add_probabilities(problem, sight,
                        problem.logsumexp + (batch * shape.query_heads + head) * shape.query_length + first_query,
                        queries, block, work);
    }
    unpack_transposed<Format>(work.sums, PANEL, shares, queries, block.count,
                              row_of<Element>(problem.weights, batch, first_head, first_query) + block.first,
                              problem.weights.row);
  }
}

template <class Format>
void weights(const AttentionWeights& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t panels = ceiling(shape.query_length, PANEL), heads = shape.query_heads;
  const int64_t at_once = problem.of_all_heads ? heads : 1, groups = heads / at_once;
  deal(shape.batch * groups * panels, threads, [&](int64_t task) {
    const int64_t panel = task % panels, group = task / panels % groups, batch = task / panels / groups;
    weigh<Format>(problem, batch, group * at_once, (group + 1) * at_once, panel * PANEL);
  });
}

}  // namespace

void attention_weights(const AttentionWeights& problem, const Threads& threads) {
  in_its_format(problem, threads, TRILBY_VECTOR_LEVEL::attention_weights,
                [&](auto format) { weights<decltype(format)>(problem, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
