// Attention of few queries to many keys, forward, on one instruction-set level: what each generated token asks for.
//
// The keys of a sequence are cut into splits of SPLIT keys, whatever the number of threads. A task is one split of one
// key head with every query that reads it, of all T positions and all query heads of the group; attention_split.h
// computes it. Whoever ends the last split of a head merges its partial maxima, sums and outputs, in the order of the
// splits.
//
// Traffic: every key and value once, and for each split 4 · (Dv + 2) bytes a query. Operations: 2 · (D + Dv) flops a
// pair, so up to some 8 queries a key wait for memory alone. Measured on AVX-512, one thread, D = 64, 8 · 12 heads of
// 8192 keys, in percent of the rate at which eight streams are only read: 93 in fp32, 87 in bf16.
#include "attention_split.h"
#include "level.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Below so many bytes of keys and values another thread is not worth waking.
constexpr int64_t SMALL = 65536;

// Splits are numbered from the first that any query sees some of.
int64_t first_split(const Sequence& sequence) { return sequence.first_seen(0) / SPLIT; }

// A sequence without keys has one, whose results are those of seeing nothing.
int64_t splits_of(const Sequence& sequence) {
  if (sequence.queries == 0) return 0;
  return greater(1, ceiling(sequence.end_seen(sequence.queries), SPLIT) - first_split(sequence));
}

// Output and logsumexp of row r from its partial results, which lie `step` floats apart.
template <class Format>
void merge_row(const AttentionForward& problem, const Group& group, int64_t r, Partial partial, int64_t splits,
               int64_t step) {
  const AttentionShape& shape = problem.shape;
  const Sequence& sequence = group.sequence;
  const float within = Scale(problem.rule).within;
  const Partial first = partial;
  float maximum = -INFINITE, sum = 0.0f;
  for (int64_t s = 0; s < splits; s++, partial.data += step) {
    maximum = *partial.maximum(r) > maximum ? *partial.maximum(r) : maximum;
  }
  const float shift = maximum == -INFINITE ? 0.0f : maximum;
  float* merged = first.output(r);
  partial = first;
  for (int64_t s = 0; s < splits; s++, partial.data += step) {
    const float factor = exp2_of_nonpositive(broadcast((*partial.maximum(r) - shift) * within * LOG2_E))[0];
    sum += *partial.sum(r) * factor;
    const float* output = partial.output(r);
    for (int64_t d = 0; d < partial.width; d += LANES) {
      const Vector share = load(output + d) * factor;
      store(merged + d, s == 0 ? share : load(merged + d) + share);
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t row = sequence.first_query + group.query(r);
  auto* to = row_of<typename Format::Element>(problem.output, sequence.batch, group.head(r), row);
  const auto put = [&](int64_t column, auto step) __attribute__((always_inline)) {
    const Pair pair = {load(merged + column) * inverse, load(merged + column + LANES) * inverse};
    store_in_order<Format>(to + column, to_memory_order<Format>(pair, step), step);
  };
  int64_t column = 0;
  for (; column + PAIR <= shape.value_dim; column += PAIR) put(column, Whole{});
  if (column < shape.value_dim) put(column, Rest{shape.value_dim - column});
  problem.logsumexp[(sequence.batch * shape.query_heads + group.head(r)) * shape.query_length + row] =
      maximum * within + __builtin_logf(sum);
}

// All splits of all sequences, and where their partial results lie.
struct Plan {
  int64_t rows;         // most queries that share a key head
  int64_t own;          // bytes of a thread's workspace
  int64_t* first;       // [sequences + 1]: number of the first split of each
  int32_t* unfinished;  // [sequences][key heads]: splits to do
  float* partials;      // [splits][key heads][rows]

  int64_t sequence_of(int64_t split, int64_t sequences) const {
    int64_t low = 0, high = sequences;  // the split is of a sequence in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= split ? low : high) = middle;
    }
    return low;
  }
};

// The calling thread's scratch memory has its own workspace first, and behind it what all threads share: as a task it
// asks for no more than that workspace, and so gets the same memory again.
template <class Format>
Plan plan_splits(const AttentionForward& problem) {
  const AttentionShape& shape = problem.shape;
  const int64_t count = problem.sequences.count, heads = shape.key_heads;
  int64_t splits = 0, rows = 0;
  for (int64_t n = 0; n < count; n++) {
    const Sequence sequence(shape, problem.sequences, problem.rule, n);
    splits += splits_of(sequence);
    rows = greater(rows, shape.query_heads / heads * sequence.queries);
  }
  const int64_t own = Workspace<Format>::bytes(shape, rows);
  const int64_t partials = splits * heads * Partial::floats(rows, shape.value_dim) * 4;
  const int64_t counters = ceiling(count * heads * 4, 8) * 8;
  char* memory = static_cast<char*>(thread_scratch(static_cast<size_t>(own + (count + 1) * 8 + counters + partials)));
  const Plan plan = {rows, own, reinterpret_cast<int64_t*>(memory + own),
                     reinterpret_cast<int32_t*>(memory + own + (count + 1) * 8),
                     reinterpret_cast<float*>(memory + own + (count + 1) * 8 + counters)};
  plan.first[0] = 0;
  for (int64_t n = 0; n < count; n++) {
    const int64_t its = splits_of(Sequence(shape, problem.sequences, problem.rule, n));
    plan.first[n + 1] = plan.first[n] + its;
    for (int64_t head = 0; head < heads; head++) plan.unfinished[n * heads + head] = static_cast<int32_t>(its);
  }
  return plan;
}

template <class Format>
void decode(const AttentionForward& problem, const Threads& threads) {
  const AttentionShape& shape = problem.shape;
  const int64_t heads = shape.key_heads, sequences = problem.sequences.count;
  const Plan plan = plan_splits<Format>(problem);
  const int64_t partial_floats = Partial::floats(plan.rows, shape.value_dim), splits = plan.first[sequences];
  const int64_t key_bytes =
      heads * (shape.head_dim + shape.value_dim) * static_cast<int64_t>(sizeof(typename Format::Element));
  const int64_t most = splits * smaller(SPLIT, shape.key_length) * key_bytes;
  deal(splits * heads, most < SMALL ? Threads{1, threads.run} : threads, [&](int64_t task) {
    const int64_t split = task / heads, head = task % heads, n = plan.sequence_of(split, sequences);
    const Group group(problem, Sequence(shape, problem.sequences, problem.rule, n), head);
    const int64_t first = plan.first[n], count = plan.first[n + 1] - first;
    const Partial all = {plan.partials + (first * heads + head) * partial_floats, whole_pairs(shape.value_dim)};
    const Partial mine = {all.data + (split - first) * heads * partial_floats, all.width};
    attend_split<Format>(problem, group, Keys(group.sequence, first_split(group.sequence) + split - first),
                         {thread_scratch(static_cast<size_t>(plan.own)), shape, plan.rows}, mine);
    if (__atomic_sub_fetch(&plan.unfinished[n * heads + head], 1, __ATOMIC_ACQ_REL) > 0) return;
    for (int64_t r = 0; r < group.rows; r++) {
      merge_row<Format>(problem, group, r, all, count, heads * partial_floats);
    }
  });
  clear_unowned_queries<Format>(problem);
}

}  // namespace

void attention_decode(const AttentionForward& problem, const Threads& threads) {
  in_format(problem.shape.dtype, [&](auto format) { decode<decltype(format)>(problem, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
