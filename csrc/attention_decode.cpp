// Attention of few queries to many keys, forward, on one instruction-set level: what each generated token asks for.
//
// The keys of a sequence are cut into splits of SPLIT keys, whatever the number of threads. A task is one split of one
// key head with every query that reads it, of all T positions and all query heads of the group:
//     scores[r][v] = queries[r] · key of visit v               a row of K in the lanes, sums across them 16 at a time
//     probabilities[r][v] = 2^((scores[r][v] - max[r]) · c)    c = |scale| · log2(e)
//     partial[r] = sum over v of probabilities[r][v] · value of visit v
// Whoever ends the last split of a head merges its partial maxima, sums and outputs, in the order of the splits.
//
// Traffic: every key and value once, and for each split 4 · (Dv + 2) bytes a query. Operations: 2 · (D + Dv) flops a
// pair, so up to some 8 queries a key wait for memory alone. Keys are visited as STREAMS runs of adjacent keys side by
// side, because one stream of addresses a thread leaves a third of the bandwidth unused; see linear.cpp.
#include "attention_forward.h"
#include "level.h"
#include "pair.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Keys in a split: enough that its partial results are 1 part in 500 of its traffic, few enough that 8 threads find
// work in 4096 keys of one head.
constexpr int64_t SPLIT = 512;
constexpr int STREAMS = 8;
constexpr int64_t CHAIN = 64;  // keys whose values are added one to the other
// Visits ahead of the one at hand whose rows are asked for: two rows further along each stream.
constexpr int64_t AHEAD = 2 * STREAMS;
constexpr int64_t LINE = 64;  // bytes that are fetched together
// Below so many bytes of keys and values another thread is not worth waking.
constexpr int64_t SMALL = 65536;

// Register tiles: sums of queries times keys, and of queries times columns. AVX-512 has 32 registers, the others 16.
constexpr int MOST_SUMS = LANES == 16 ? 16 : 8;
constexpr int MOST_QUERIES = LANES == 16 ? 4 : 2;

int64_t whole_pairs(int64_t columns) { return ceiling(columns, PAIR) * PAIR; }

// What a thread works in, for R queries.
template <class Format>
struct Workspace {
  using Element = typename Format::Element;
  float *queries, *scores, *numbers;  // [R][D], [R][SPLIT], [SPLIT]: the keys' numbers, as floats
  const Element **keys, **values;     // rows in the order of the visits, AHEAD of them past the last

  static int64_t bytes(const AttentionShape& shape, int64_t R) {
    const int64_t floats = R * whole_pairs(shape.head_dim) + (R + 1) * SPLIT;
    const int64_t pointers = 2 * SPLIT + AHEAD;
    return (floats * 4 + pointers * static_cast<int64_t>(sizeof(void*)) + LINE - 1) / LINE * LINE;
  }

  Workspace(void* memory, const AttentionShape& shape, int64_t R)
      : queries(static_cast<float*>(memory)),
        scores(queries + R * whole_pairs(shape.head_dim)),
        numbers(scores + R * SPLIT),
        keys(reinterpret_cast<const Element**>(numbers + SPLIT)),
        values(nullptr) {}
};

// The queries that read one key head of one sequence: row r is query r % T of query head first_head + r / T.
struct Group {
  Sequence sequence;
  int64_t key_head, first_head, rows;

  Group(const AttentionForward& problem, const Sequence& its, int64_t head)
      : sequence(its), key_head(head), first_head(0), rows(0) {
    const int64_t heads = problem.shape.query_heads / problem.shape.key_heads;
    first_head = head * heads;
    rows = heads * its.queries;
  }
  int64_t query(int64_t r) const { return r % sequence.queries; }
  int64_t head(int64_t r) const { return first_head + r / sequence.queries; }
};

// Partial results of one group and split: for each row the maximum, the sum and the output, in pair order.
struct Partial {
  float* data;
  int64_t width;

  static int64_t floats(int64_t rows, int64_t value_dim) { return rows * (2 + whole_pairs(value_dim)); }
  float* maximum(int64_t r) const { return data + r * (2 + width); }
  float* sum(int64_t r) const { return maximum(r) + 1; }
  float* output(int64_t r) const { return maximum(r) + 2; }
};

template <class Format>
void load_queries(const AttentionForward& problem, const Group& group, float* to) {
  const int64_t width = whole_pairs(problem.shape.head_dim);
  const float sign = Scale(problem.rule).sign;
  for (int64_t r = 0; r < group.rows; r++, to += width) {
    const auto* row = row_of<const typename Format::Element>(problem.query, group.sequence.batch, group.head(r),
                                                             group.sequence.first_query + group.query(r));
    unpack_in_pair_order<Format, Format>(row, problem.query.column, problem.shape.head_dim, to);
    for (int64_t d = 0; d < width; d += LANES) store(to + d, load(to + d) * sign);
  }
}

// In which order `count` keys are visited: STREAMS runs of `run` adjacent ones side by side; the last runs are shorter.
// With 5 keys and 3 streams, where the numbers are those of the visits:    0 3 | 1 4 | 2
struct Order {
  int64_t count, run, whole, rest;  // `whole` runs, and one of `rest`

  explicit Order(int64_t keys)
      : count(keys), run(ceiling(keys, STREAMS)), whole(keys / run), rest(keys - keys / run * run) {}

  // Calls put(visit, key) for every key, and start(key, most) before those that begin a run, or follow what it was good
  // for: it returns how many more keys it is good for, `most` at most.
  template <class Start, class Put>
  void walk(const Start& start, const Put& put) const {
    for (int64_t stream = 0; stream * run < count; stream++) {
      const int64_t length = smaller(run, count - stream * run);
      int64_t visit = stream;
      for (int64_t i = 0; i < length;) {
        for (const int64_t end = i + start(stream * run + i, length - i); i < end;) {
          put(visit, stream * run + i);
          visit += ++i <= rest ? whole + 1 : whole;
        }
      }
    }
  }
};

template <class Format>
void find_rows(const AttentionForward& problem, const Group& group, const View& view, int64_t first, const Order& order,
               const typename Format::Element** rows) {
  const typename Format::Element* row = nullptr;
  order.walk(
      [&](int64_t key, int64_t most) {
        const KeyRows found(problem.sequences, group.sequence, first + key, most);
        row = row_of<const typename Format::Element>(view, found.batch, group.key_head, found.row);
        return found.count;
      },
      [&](int64_t visit, int64_t) {
        rows[visit] = row;
        row += view.row;
      });
}

// Whether it matters which key is visited when.
bool asks_for_numbers(const AttentionRule& rule, const Sequence& sequence) {
  return rule.alibi_slopes || rule.mask_kind != Mask::none || sequence.queries > 1;
}

// Puts the keys [first, first + count) in the order in which they are visited, and says which they are. Visits past the
// last, up to a whole vector, and what is fetched ahead, repeat a row that exists.
template <class Format>
void plan_visits(const AttentionForward& problem, const Group& group, int64_t first, int64_t count,
                 Workspace<Format>& work) {
  const Order order(count);
  const int64_t padded = ceiling(count, LANES) * LANES;
  work.values = work.keys + padded;
  find_rows<Format>(problem, group, problem.key, first, order, work.keys);
  find_rows<Format>(problem, group, problem.value, first, order, work.values);
  for (int64_t past = count; past < padded; past++) work.keys[past] = work.keys[count - 1];
  for (int64_t past = 0; past < AHEAD; past++) work.values[count + past] = work.values[count - 1];
  if (!asks_for_numbers(problem.rule, group.sequence)) return;
  order.walk([](int64_t, int64_t most) { return most; },
             [&](int64_t visit, int64_t key) { work.numbers[visit] = static_cast<float>(first + key); });
}

template <class Format>
static inline void fetch(const typename Format::Element* row, int64_t columns) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t line = 0; line < columns * static_cast<int64_t>(sizeof *row); line += LINE) {
    __builtin_prefetch(bytes + line);
  }
}

// sums[r][first + n] = lane by lane products of query r with row n, for R queries and N rows.
template <class Format, int R, int N>
static inline void multiply(const typename Format::Element* const* rows, const float* queries, int64_t width,
                            int64_t columns, int first, Vector (&sums)[R][LANES]) {
  Vector sum[R][N];
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) sum[r][n] = Vector{};
  }
  const auto add = [&](int64_t column, auto step) __attribute__((always_inline)) {
    Pair query[R];
    for (int r = 0; r < R; r++)
      query[r] = {load(queries + r * width + column), load(queries + r * width + column + LANES)};
    for (int n = 0; n < N; n++) {
      const Pair row = load_pair<Format>(rows[n] + column, step);
      for (int r = 0; r < R; r++) sum[r][n] += row.first * query[r].first;
      for (int r = 0; r < R; r++) sum[r][n] += row.second * query[r].second;
    }
  };
  int64_t column = 0;
  for (; column + PAIR <= columns; column += PAIR) add(column, Whole{});
  if (column < columns) add(column, Rest{columns - column});
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) sums[r][first + n] = sum[r][n];
  }
}

// Scores of R queries and LANES rows.
template <class Format, int R>
static inline void score(const typename Format::Element* const* rows, const float* queries, int64_t width,
                         int64_t columns, float* scores) {
  constexpr int N = MOST_SUMS / R < LANES ? (MOST_SUMS / R < 8 ? MOST_SUMS / R : 8) : LANES;
  Vector sums[R][LANES];
  for (int n = 0; n < LANES; n += N) multiply<Format, R, N>(rows + n, queries, width, columns, n, sums);
  for (int r = 0; r < R; r++) store(scores + r * SPLIT, horizontal_sums(sums[r]));
}

template <class Format>
void score_all(const AttentionShape& shape, const Group& group, int64_t count, const Workspace<Format>& work) {
  const int64_t D = shape.head_dim, width = whole_pairs(D);
  for (int64_t visit = 0; visit < count; visit += LANES) {
    for (int64_t ahead = visit; ahead < visit + LANES; ahead++) fetch<Format>(work.keys[ahead + AHEAD], D);
    const auto* const* rows = work.keys + visit;
    int64_t r = 0;
    if constexpr (MOST_QUERIES == 4) {
      for (; r + 4 <= group.rows; r += 4) {
        score<Format, 4>(rows, work.queries + r * width, width, D, work.scores + r * SPLIT + visit);
      }
    }
    for (; r + 2 <= group.rows; r += 2) {
      score<Format, 2>(rows, work.queries + r * width, width, D, work.scores + r * SPLIT + visit);
    }
    for (; r < group.rows; r++) {
      score<Format, 1>(rows, work.queries + r * width, width, D, work.scores + r * SPLIT + visit);
    }
  }
}

// What a mask adds to the score of one pair: -inf hides it.
float mask_at(const AttentionRule& rule, const Group& group, int64_t r, int64_t key) {
  const View& mask = rule.mask;
  const int64_t offset =
      group.sequence.number * mask.batch + group.head(r) * mask.head + group.query(r) * mask.row + key * mask.column;
  switch (rule.mask_kind) {
    case Mask::none: return 0.0f;
    case Mask::boolean: return static_cast<const uint8_t*>(mask.data)[offset] ? 0.0f : -INFINITE;
    case Mask::float32: return static_cast<const float*>(mask.data)[offset];
    case Mask::bfloat16: return load_some<BFloat16>(static_cast<const uint16_t*>(mask.data) + offset, 1)[0];
    case Mask::float16: return load_some<Float16>(static_cast<const uint16_t*>(mask.data) + offset, 1)[0];
  }
  return 0.0f;
}

// Products of query and key to scores as the softmax takes them, but for the mask.
void adjust_row(const AttentionRule& rule, const Group& group, int64_t r, int64_t count, const float* numbers,
                float* scores) {
  const float size = Scale(rule).size;
  for (int64_t v = 0; v < count; v += LANES) {
    Vector score = load(scores + v) * size;
    if (rule.softcap > 0.0f) score = tanh(score * (1.0f / rule.softcap)) * rule.softcap;
    if (rule.alibi_slopes) {
      const Sequence& sequence = group.sequence;
      const float slope = rule.alibi_slopes[sequence.number * rule.alibi_sequence + group.head(r) * rule.alibi_head];
      const Vector distance = static_cast<float>(group.query(r) + sequence.offset) - load(numbers + v);
      score -= (Vector)((Bits)distance & 0x7fffffffu) * slope;
    }
    store(scores + v, score);
  }
}

// Adds the mask of row r, and -inf to what it hides or the window does; says whether any pair is hidden.
bool hide_row(const AttentionRule& rule, const Group& group, int64_t r, int64_t count, const float* numbers,
              float* scores) {
  const Sequence& sequence = group.sequence;
  if (rule.mask_kind == Mask::none && sequence.queries == 1) return false;  // the split is cut to what one query sees
  const int64_t i = group.query(r), first = i - sequence.before, last = i + sequence.after;
  bool hidden = false;
  for (int64_t v = 0; v < count; v++) {
    const int64_t key = static_cast<int64_t>(numbers[v]);
    const float added = key < first || key > last ? -INFINITE : mask_at(rule, group, r, key);
    scores[v] = added == -INFINITE ? -INFINITE : scores[v] + added;
    hidden |= added == -INFINITE;
  }
  return hidden;
}

// A probability of what is hidden: its value is not looked at, since 0 · NaN is NaN.
constexpr float HIDDEN = -1.0f;

// Scores of one row, whose visits past `count` count for nothing, to probabilities relative to their maximum.
void softmax_row(float* scores, int64_t count, float factor, bool hidden, float* maximum, float* sum) {
  const int64_t padded = ceiling(count, LANES) * LANES;
  for (int64_t v = count; v < padded; v++) scores[v] = -INFINITE;
  Vector largest = broadcast(-INFINITE);
  for (int64_t v = 0; v < padded; v += LANES) largest = larger(load(scores + v), largest);
  *maximum = -INFINITE;
  for (int lane = 0; lane < LANES; lane++) *maximum = largest[lane] > *maximum ? largest[lane] : *maximum;
  const Vector shift = broadcast(*maximum == -INFINITE ? 0.0f : *maximum);  // nothing seen: -inf - 0, not -inf + inf
  Vector total = {};
  for (int64_t v = 0; v < padded; v += LANES) {
    const Vector score = load(scores + v);
    const Vector probability = exp2_of_nonpositive((score - shift) * factor);
    total += probability;
    store(scores + v, hidden && v < count ? (score == -INFINITE ? broadcast(HIDDEN) : probability) : probability);
  }
  *sum = horizontal_sum(total);
}

// output[r] = sum of probability times value, for R queries and C pairs of columns, or the one that is left. Every
// CHAIN keys are summed on their own: a long sum made of short ones is the more exact.
template <class Format, int R, int C, bool HIDES, class Step>
static inline void add_values(const typename Format::Element* const* rows, int64_t count, const float* probabilities,
                              int64_t column, int64_t columns, Step step, const Partial& partial, int64_t first) {
  for (int64_t begin = 0; begin < count; begin += CHAIN) {
    Pair sums[R][C] = {};
    for (int64_t v = begin; v < smaller(begin + CHAIN, count); v++) {
      if (column == 0 && first == 0) fetch<Format>(rows[v + AHEAD], columns);
      Pair values[C];
      for (int c = 0; c < C; c++) values[c] = load_pair<Format>(rows[v] + column + c * PAIR, step);
      for (int r = 0; r < R; r++) {
        const float probability = probabilities[r * SPLIT + v];
        if (HIDES && probability == HIDDEN) continue;
        for (int c = 0; c < C; c++) sums[r][c] = sums[r][c] + values[c] * probability;
      }
    }
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < C; c++) {
        float* to = partial.output(first + r) + column + c * PAIR;
        store(to, begin ? load(to) + sums[r][c].first : sums[r][c].first);
        store(to + LANES, begin ? load(to + LANES) + sums[r][c].second : sums[r][c].second);
      }
    }
  }
}

// Columns from `column` on, in tiles of C pairs, then of half as many.
template <class Format, int R, bool HIDES, int C = MOST_SUMS / (2 * R)>
void add_columns(const typename Format::Element* const* rows, int64_t count, const float* probabilities, int64_t column,
                 int64_t columns, const Partial& partial, int64_t first) {
  for (; column + C * PAIR <= columns; column += C * PAIR) {
    add_values<Format, R, C, HIDES>(rows, count, probabilities, column, columns, Whole{}, partial, first);
  }
  if (column == columns) return;
  if constexpr (C > 1) {
    add_columns<Format, R, HIDES, C / 2>(rows, count, probabilities, column, columns, partial, first);
  } else {
    const Rest rest = {columns - column};
    add_values<Format, R, 1, HIDES>(rows, count, probabilities, column, columns, rest, partial, first);
  }
}

template <class Format, bool HIDES>
void add_all(const AttentionShape& shape, const Group& group, int64_t count, const Workspace<Format>& work,
             const Partial& partial) {
  const int64_t columns = shape.value_dim;
  int64_t r = 0;
  if constexpr (MOST_QUERIES == 4) {
    for (; r + 4 <= group.rows; r += 4) {
      add_columns<Format, 4, HIDES>(work.values, count, work.scores + r * SPLIT, 0, columns, partial, r);
    }
  }
  for (; r + 2 <= group.rows; r += 2) {
    add_columns<Format, 2, HIDES>(work.values, count, work.scores + r * SPLIT, 0, columns, partial, r);
  }
  for (; r < group.rows; r++) {
    add_columns<Format, 1, HIDES>(work.values, count, work.scores + r * SPLIT, 0, columns, partial, r);
  }
}

// Keys of one split that any query of the group sees: none, if the first is not below the end.
struct Keys {
  int64_t first, end;

  Keys(const Sequence& sequence, int64_t split)
      : first(greater(split * SPLIT, sequence.first_seen(0))),
        end(smaller((split + 1) * SPLIT, sequence.end_seen(sequence.queries))) {}
};

// Splits are numbered from the first that any query sees some of.
int64_t first_split(const Sequence& sequence) { return sequence.first_seen(0) / SPLIT; }

// A sequence without keys has one, whose results are those of seeing nothing.
int64_t splits_of(const Sequence& sequence) {
  if (sequence.queries == 0) return 0;
  return greater(1, ceiling(sequence.end_seen(sequence.queries), SPLIT) - first_split(sequence));
}

template <class Format>
void attend_split(const AttentionForward& problem, const Group& group, int64_t split, Workspace<Format> work,
                  const Partial& partial) {
  const Keys keys(group.sequence, first_split(group.sequence) + split);
  const int64_t count = greater(0, keys.end - keys.first);
  if (count == 0) {
    for (int64_t r = 0; r < group.rows; r++) {
      *partial.maximum(r) = -INFINITE;
      for (int64_t i = 0; i < 1 + partial.width; i++) partial.sum(r)[i] = 0.0f;
    }
    return;
  }
  load_queries<Format>(problem, group, work.queries);
  plan_visits<Format>(problem, group, keys.first, count, work);
  score_all<Format>(problem.shape, group, count, work);
  const float factor = Scale(problem.rule).within * LOG2_E;
  bool hides = false;
  for (int64_t r = 0; r < group.rows; r++) {
    float* scores = work.scores + r * SPLIT;
    if (adjusts(problem.rule)) adjust_row(problem.rule, group, r, count, work.numbers, scores);
    const bool hidden = hide_row(problem.rule, group, r, count, work.numbers, scores);
    softmax_row(scores, count, factor, hidden, partial.maximum(r), partial.sum(r));
    hides |= hidden;
  }
  if (hides) {
    add_all<Format, true>(problem.shape, group, count, work, partial);
  } else {
    add_all<Format, false>(problem.shape, group, count, work, partial);
  }
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
    attend_split<Format>(problem, group, split - first,
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
  switch (problem.shape.dtype) {
    case Dtype::float32: return decode<Float32>(problem, threads);
    case Dtype::bfloat16: return decode<BFloat16>(problem, threads);
    case Dtype::float16: return decode<Float16>(problem, threads);
  }
}

}  // namespace trilby::TRILBY_LEVEL
