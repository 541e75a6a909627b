// Decoding: the two products of a split, and the softmax between them, for all queries that share its keys.
//     scores[r][v] = queries[r] · key of visit v               a row of K in the lanes, sums across them 16 at a time
//     probabilities[r][v] = 2^((scores[r][v] - max[r]) · c)    c = |scale| · log2(e)
//     output[r] = sum over v of probabilities[r][v] · value of visit v
// For each visit and query, of D = 64 in bf16 on AVX-512: 12 multiply-adds and conversions for the score, 3 to add up
// its lanes, 1 for the softmax, 8 for the values.
#pragma once

#include "attention_forward.h"
#include "attention_visits.h"

namespace trilby::TRILBY_LEVEL {

constexpr int64_t CHAIN = 64;  // keys whose values are added one to the other

// Register tiles: sums of queries times keys, and of queries times columns. AVX-512 has 32 registers, the others 16.
constexpr int MOST_SUMS = LANES == 16 ? 16 : 8;
constexpr int MOST_QUERIES = LANES == 16 ? 4 : 2;

// Asks for the `columns` columns from `column` on of N rows.
template <class Format, int N>
static inline void fetch(const typename Format::Element* const* rows, int64_t column, int64_t columns) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(typename Format::Element));
  for (int64_t line = 0; line < bytes; line += LINE) {
    for (int n = 0; n < N; n++) __builtin_prefetch(reinterpret_cast<const char*>(rows[n] + column) + line);
  }
}

// Calls visit(r, std::integral_constant<int, R>) for tiles of R queries, the first with r = 0.
template <class Visit>
static inline void in_tiles(int64_t queries, const Visit& visit) {
  int64_t r = 0;
  if constexpr (MOST_QUERIES == 4) {
    for (; r + 4 <= queries; r += 4) visit(r, std::integral_constant<int, 4>{});
  }
  for (; r + 2 <= queries; r += 2) visit(r, std::integral_constant<int, 2>{});
  for (; r < queries; r++) visit(r, std::integral_constant<int, 1>{});
}

template <class Format>
static void load_queries(const AttentionForward& problem, const Group& group, float* to) {
  const int64_t width = whole_pairs(problem.shape.head_dim);
  const float sign = Scale(problem.rule).sign;
  for (int64_t r = 0; r < group.rows; r++, to += width) {
    const auto* row = row_of<const typename Format::Element>(problem.query, group.sequence.batch, group.head(r),
                                                             group.sequence.first_query + group.query(r));
    unpack_in_pair_order<Format, Format>(row, problem.query.column, problem.shape.head_dim, to);
    for (int64_t d = 0; d < width; d += LANES) store(to + d, load(to + d) * sign);
  }
}

// sums[r][FIRST + n] = lane by lane products of query r with row FIRST + n, for R queries and N rows.
template <class Format, int FIRST, int R, int N>
static inline void multiply(const typename Format::Element* const* rows, const float* queries, int64_t width,
                            int64_t columns, Vector (&sums)[R][LANES]) {
  for (int r = 0; r < R; r++) {
    for (int n = FIRST; n < FIRST + N; n++) sums[r][n] = Vector{};
  }
  const auto add = [&](int64_t column, auto step) __attribute__((always_inline)) {
    Pair query[R];
    for (int r = 0; r < R; r++)
      query[r] = {load(queries + r * width + column), load(queries + r * width + column + LANES)};
    for (int n = FIRST; n < FIRST + N; n++) {
      const Pair row = load_pair<Format>(rows[n] + column, step);
      for (int r = 0; r < R; r++) sums[r][n] += row.first * query[r].first;
      for (int r = 0; r < R; r++) sums[r][n] += row.second * query[r].second;
    }
  };
  int64_t column = 0;
  for (; column + PAIR <= columns; column += PAIR) add(column, Whole{});
  if (column < columns) add(column, Rest{columns - column});
}

// Scores of R queries and LANES rows, N of them at a time.
template <class Format, int R, int N, int... TILE>
static inline void score(const typename Format::Element* const* rows, const float* queries, int64_t width,
                         int64_t columns, float* scores, std::integer_sequence<int, TILE...>) {
  Vector sums[R][LANES];
  (multiply<Format, TILE * N, R, N>(rows, queries, width, columns, sums), ...);
  for (int r = 0; r < R; r++) store(scores + r * SPLIT, horizontal_sums(sums[r]));
}

template <class Format>
static void score_all(const AttentionShape& shape, const Group& group, int64_t count, const Workspace<Format>& work) {
  const int64_t D = shape.head_dim, width = whole_pairs(D);
  for (int64_t visit = 0; visit < count; visit += LANES) {
    fetch<Format, LANES>(work.keys + visit + AHEAD, 0, D);
    in_tiles(group.rows, [&](int64_t r, auto tile) __attribute__((always_inline)) {
      constexpr int R = tile.value, MOST = MOST_SUMS / R < STREAMS ? MOST_SUMS / R : STREAMS;
      constexpr int N = MOST < LANES ? MOST : LANES;
      score<Format, R, N>(work.keys + visit, work.queries + r * width, width, D, work.scores + r * SPLIT + visit,
                          std::make_integer_sequence<int, LANES / N>{});
    });
  }
}

// Products of query and key to scores as the softmax takes them, but for the mask.
static inline void adjust_row(const AttentionRule& rule, const Group& group, int64_t r, const Keys& keys,
                              const float* numbers, float* scores) {
  const Sequence& sequence = group.sequence;
  const float size = Scale(rule).size;
  const float from_first = static_cast<float>(group.query(r) + sequence.offset - keys.first);
  for (int64_t v = 0; v < keys.count(); v += LANES) {
    Vector score = load(scores + v) * size;
    if (rule.softcap > 0.0f) score = tanh(score * (1.0f / rule.softcap)) * rule.softcap;
    if (rule.alibi_slopes) {
      const float slope = rule.alibi_slopes[sequence.number * rule.alibi_sequence + group.head(r) * rule.alibi_head];
      score -= (Vector)((Bits)(from_first - load(numbers + v)) & 0x7fffffffu) * slope;
    }
    store(scores + v, score);
  }
}

// Adds the mask of row r, whose elements are read by added(element), to the scores; whether it hides any.
template <class Element, class Added>
static inline bool add_mask(const View& mask, const Group& group, int64_t r, const Keys& keys, const float* numbers,
                            float* scores, const Added& added) {
  const Element* row =
      row_of<const Element>(mask, group.sequence.number, group.head(r), group.query(r)) + keys.first * mask.column;
  bool hidden = false;
  for (int64_t v = 0; v < keys.count(); v++) {
    const float addend = added(row + static_cast<int64_t>(numbers[v]) * mask.column);
    scores[v] = addend == -INFINITE ? -INFINITE : scores[v] + addend;
    hidden |= addend == -INFINITE;
  }
  return hidden;
}

// Hides what lies outside the window of row r; whether that is any.
static inline bool hide_outside(const Group& group, int64_t r, const Keys& keys, const float* numbers, float* scores) {
  const int64_t i = group.query(r), before_first = i - group.sequence.before - keys.first;
  const int64_t last = i + group.sequence.after - keys.first;
  if (before_first <= 0 && last >= keys.count() - 1) return false;
  const Vector from = broadcast(static_cast<float>(before_first)), to = broadcast(static_cast<float>(last));
  for (int64_t v = 0; v < keys.count(); v += LANES) {
    const Vector key = load(numbers + v);
    const Vector late = key > to ? broadcast(-INFINITE) : load(scores + v);
    store(scores + v, key < from ? broadcast(-INFINITE) : late);
  }
  return true;
}

// Adds the mask of row r, and -inf to what it hides or the window does; says whether any pair is hidden.
static inline bool hide_row(const AttentionRule& rule, const Group& group, int64_t r, const Keys& keys,
                            const float* numbers, float* scores) {
  const auto add = [&](auto element, const auto& added) {
    return add_mask<decltype(element)>(rule.mask, group, r, keys, numbers, scores, added);
  };
  bool hidden = false;
  switch (rule.mask_kind) {
    case Mask::none: break;
    case Mask::boolean: hidden = add(uint8_t{}, [](auto* seen) { return *seen ? 0.0f : -INFINITE; }); break;
    case Mask::float32: hidden = add(float{}, [](auto* addend) { return *addend; }); break;
    case Mask::bfloat16: hidden = add(uint16_t{}, [](auto* at) { return load_some<BFloat16>(at, 1)[0]; }); break;
    case Mask::float16: hidden = add(uint16_t{}, [](auto* at) { return load_some<Float16>(at, 1)[0]; }); break;
  }
  return hide_outside(group, r, keys, numbers, scores) || hidden;
}

// A probability of what is hidden: its value is not looked at, since 0 · NaN is NaN.
constexpr float HIDDEN = -1.0f;

// Scores of one row, whose visits past `count` count for nothing, to probabilities relative to their maximum.
static inline void softmax_row(float* scores, int64_t count, float factor, bool hidden, float* maximum, float* sum) {
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

// Partial results of one group and split: for each row the maximum, the sum and the output, in pair order.
struct Partial {
  float* data;
  int64_t width;

  static int64_t floats(int64_t rows, int64_t value_dim) { return rows * (2 + whole_pairs(value_dim)); }
  float* maximum(int64_t r) const { return data + r * (2 + width); }
  float* sum(int64_t r) const { return maximum(r) + 1; }
  float* output(int64_t r) const { return maximum(r) + 2; }
};

// output[r] = sum of probability times value, for R queries and C pairs of columns, or the one that is left. Every
// CHAIN keys are summed on their own: a long sum made of short ones is the more exact.
template <class Format, bool HIDES, bool FETCHES, int R, int C, class Step>
static inline void add_values(const typename Format::Element* const* rows, int64_t count, const float* probabilities,
                              int64_t column, Step step, const Partial& partial, int64_t first) {
  for (int64_t begin = 0; begin < count; begin += CHAIN) {
    Pair sums[R][C] = {};
    for (int64_t v = begin, end = smaller(begin + CHAIN, count); v < end; v++) {
      Pair values[C];
      for (int c = 0; c < C; c++) {
        if constexpr (FETCHES) fetch<Format, 1>(rows + v + AHEAD, column + c * PAIR, PAIR);
        values[c] = load_pair<Format>(rows[v] + column + c * PAIR, step);
      }
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
template <class Format, bool HIDES, bool FETCHES, int R, int C = MOST_SUMS / (2 * R)>
static void add_columns(const typename Format::Element* const* rows, int64_t count, const float* probabilities,
                        int64_t column, int64_t columns, const Partial& partial, int64_t first) {
  for (; column + C * PAIR <= columns; column += C * PAIR) {
    add_values<Format, HIDES, FETCHES, R, C>(rows, count, probabilities, column, Whole{}, partial, first);
  }
  if (column == columns) return;
  if constexpr (C > 1) {
    add_columns<Format, HIDES, FETCHES, R, C / 2>(rows, count, probabilities, column, columns, partial, first);
  } else {
    const Rest rest = {columns - column};
    add_values<Format, HIDES, FETCHES, R, 1>(rows, count, probabilities, column, rest, partial, first);
  }
}

template <class Format, bool HIDES>
static void add_all(const AttentionShape& shape, const Group& group, int64_t count, const Workspace<Format>& work,
                    const Partial& partial) {
  in_tiles(group.rows, [&](int64_t r, auto tile) {
    const float* probabilities = work.scores + r * SPLIT;
    constexpr int R = tile.value;
    if (HIDES || r == 0) {  // what hides is compiled once: fetching again what is there costs little
      add_columns<Format, HIDES, true, R>(work.values, count, probabilities, 0, shape.value_dim, partial, r);
    } else {
      add_columns<Format, false, false, R>(work.values, count, probabilities, 0, shape.value_dim, partial, r);
    }
  });
}

// One split's partial results.
template <class Format>
static void attend_split(const AttentionForward& problem, const Group& group, const Keys& keys, Workspace<Format> work,
                         const Partial& partial) {
  const int64_t count = keys.count();
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
    if (adjusts(problem.rule)) adjust_row(problem.rule, group, r, keys, work.numbers, scores);
    const bool hidden = hide_row(problem.rule, group, r, keys, work.numbers, scores);
    softmax_row(scores, count, factor, hidden, partial.maximum(r), partial.sum(r));
    hides |= hidden;
  }
  if (hides) {
    add_all<Format, true>(problem.shape, group, count, work, partial);
  } else {
    add_all<Format, false>(problem.shape, group, count, work, partial);
  }
}

}  // namespace trilby::TRILBY_LEVEL
