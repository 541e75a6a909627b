// Layer norm and RMS norm, forward, on one instruction-set level; with a residual branch, dropped out or not, added
// first.
//
//     summed = stream + dropout(branch)                        only with a branch
//     normalized = (summed - mean) · rstd · weight + bias      mean = 0 for an RMS norm
//
// A row is read from memory once: its normalization finds it in the cache. The statistics of a row are taken before the
// row above it is normalized, so that neither waits for the other, and the row below it is fetched meanwhile. Wide rows
// are computed several side by side.
// Traffic an element: one read and one write, or two and two with a branch.
//
// The statistics take one pass where the row's mean is small beside its deviation, as a residual stream's is: then the
// sum of squares gives the variance. Otherwise another pass, in the cache, takes deviations from the mean, so that a
// mean of 10⁶ costs the variance nothing: they are exact near that mean.
#include "norm.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// The row's mean is origin + shift; `origin` is 0, or where deviations were taken from.
struct Statistics {
  float origin, shift, rstd;
};

// Sums over a row.
struct Moments {
  float sum, squares;
};

// Adds up a row's elements and their squares, in local arrays that stay in registers: a struct of chains that a
// function returned was zeroed in memory first, by an instruction (rep stos) that waits for every store before it,
// streamed ones included. That cost 100 ns a row.
static_assert(CHAINS == 2, "chains are added up as two");
Moments moments_of(const Pair (&sums)[CHAINS], const Pair (&squares)[CHAINS]) {
  return {total(sums[0] + sums[1]), total(squares[0] + squares[1])};
}

// Of the elements, or with ORIGIN of their deviations from `origin`.
template <class Source, bool SHIFT, bool ORIGIN>
Moments moments(const typename Source::Element* row, int64_t width, float origin) {
  Pair sums[CHAINS] = {}, squares[CHAINS] = {};
  walk<CHAINS>(width, [=, &sums, &squares](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    Pair element = load_pair<Source>(row + column, step);
    if constexpr (ORIGIN) element = only_columns(element - origin, step);
    if constexpr (SHIFT) sums[chain] = sums[chain] + element;
    squares[chain] = squares[chain] + element * element;
  });
  return moments_of(sums, squares);
}

float variance_of(const Moments& of, float shift, float count) {
  const float variance = of.squares / count - shift * shift;
  return variance < 0.0f ? 0.0f : variance;
}

float reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <class Source, bool CENTERED>
Statistics statistics(const Moments& of, const typename Source::Element* row, int64_t width, float eps) {
  const float count = static_cast<float>(width);
  float origin = 0.0f, shift = CENTERED ? of.sum / count : 0.0f, variance = variance_of(of, shift, count);
  // A variance that is a difference loses a factor of 1 + shift² / variance: up to here 1.25, a third of a bit. One
  // pass mends that; a second one does where a sum of 65,537 elements of 10⁶ was itself off by more than the deviation.
  for (int passes = 0; passes < 2 && shift * shift > 0.25f * variance; passes++) {
    origin += shift;
    const Moments from = moments<Source, true, true>(row, width, origin);
    shift = from.sum / count;
    variance = variance_of(from, shift, count);
  }
  return {origin, shift, reciprocal_root(variance + eps)};
}

struct Weights {
  const float *weight, *bias;  // in pair order
  bool bounded;                // none is a NaN or as large as LARGE_WEIGHT
};

// A row's results are below 2^111, as bounded rounding needs it, if its squares have a finite sum, so that its elements
// are below 2^64, and rstd is below 2^24 and weight and bias are below 2^20. `rstd` is 0 or a NaN where the sum is not.
constexpr float LARGE_RSTD = 0x1p24f, LARGE_WEIGHT = 0x1p20f;

bool is_bounded(const Statistics& of) { return of.origin == 0.0f && of.rstd > 0.0f && of.rstd < LARGE_RSTD; }

template <class Format>
bool are_bounded(const float* weights, int64_t width) {
  if (!std::is_same_v<Format, BFloat16>) return true;
  Pair within = {broadcast(1.0f), broadcast(1.0f)};
  walk(width, [=, &within](int64_t column, auto step, int) __attribute__((always_inline)) {
    const Pair weight = load_pair<Float32>(weights + column, step);
    const Pair square = weight * weight;
    constexpr float LARGE = LARGE_WEIGHT * LARGE_WEIGHT;
    within = {square.first < LARGE ? within.first : Vector{}, square.second < LARGE ? within.second : Vector{}};
  });
  return total(within) == static_cast<float>(PAIR);
}

template <class Format, bool CENTERED, bool BRANCH, Stores STORES>
class Forward {
  using Element = typename Format::Element;
  using Source = std::conditional_t<BRANCH, Float32, Format>;

  const NormForward& call;
  const Weights weights;
  const RowScratch scratch;
  const int64_t begin, end, width;

  // Adds the branch to row r, and takes the sum's moments. What is normalized is the sum as it is stored: the backward
  // reads that again.
  template <int ROWS, Rounding ROUNDING>
  Moments add_branch(int64_t r) const {
    const Element *stream = row_at<Format>(call.stream, r), *branch = row_at<Format>(call.branch, r);
    Element* const summed = static_cast<Element*>(call.summed) + r * width;
    float* const sums = row_of_sums<ROWS>(r);
    const bool drops = call.dropout.threshold != 0;
    if (drops) dropout_factors(call.dropout, r, width, sums);  // each lies there until its sum takes its place
    Pair moment[CHAINS] = {}, squares[CHAINS] = {};
    walk<CHAINS>(width, [=, &moment, &squares](int64_t column, auto step, int chain) __attribute__((always_inline)) {
      Pair added = load_pair<Format>(branch + column, step);
      if (drops) {
        const Pair kept = load_in_order<Float32>(sums + column, step);
        added = added * to_pair_order<Format, decltype(step)>(kept, step);
      }
      const Pair sum = rounded<Format, ROUNDING>(load_pair<Format>(stream + column, step) + added);
      store_rounded<Format, STORES>(summed + column, sum, step);
      store_in_order<Float32>(sums + column, sum, step);
      if constexpr (CENTERED) moment[chain] = moment[chain] + sum;
      squares[chain] = squares[chain] + sum * sum;
    });
    return moments_of(moment, squares);
  }

  // Normalizes rows r, r + 1, …, and starts to fetch as many that follow the next ones. Bounded rows have their origin
  // at 0.
  template <int ROWS, Rounding ROUNDING>
  void normalize(int64_t r, const Statistics (&of)[ROWS]) const {
    const typename Source::Element* rows[ROWS];
    const Element *stream[ROWS], *branch[ROWS];
    Element* normalized[ROWS];
    float origin[ROWS], offset[ROWS], rstd[ROWS];
    for (int i = 0; i < ROWS; i++) {
      const int64_t ahead = smaller(r + 2 * ROWS + i, end - 1);
      rows[i] = source<ROWS>(r + i);
      stream[i] = row_at<Format>(call.stream, ahead);
      branch[i] = BRANCH ? row_at<Format>(call.branch, ahead) : nullptr;
      normalized[i] = static_cast<Element*>(call.normalized) + (r + i) * width;
      origin[i] = of[i].origin;
      offset[i] = -of[i].shift * of[i].rstd;
      rstd[i] = of[i].rstd;
    }
    walk(width, [=, weights = weights](int64_t column, auto step, int) __attribute__((always_inline)) {
      const Pair scale = load_pair<Float32>(weights.weight + column, step);
      const Pair added = load_pair<Float32>(weights.bias + column, step);
      for (int i = 0; i < ROWS; i++) {
        fetch<NEAREST>(stream[i] + column);
        if constexpr (BRANCH) fetch<NEAREST>(branch[i] + column);
        Pair element = load_pair<Source>(rows[i] + column, step);
        if constexpr (ROUNDING == Rounding::exact) element = element - origin[i];
        const Pair unit = element * rstd[i] + offset[i];
        store_pair<Format, STORES, ROUNDING>(normalized[i] + column, unit * scale + added, step);
      }
    });
  }

  template <int ROWS>
  float* row_of_sums(int64_t r) const {
    return scratch.rows[(r - begin) % (2 * ROWS)];
  }

  // Where row r is read from a second time.
  template <int ROWS>
  const typename Source::Element* source(int64_t r) const {
    if constexpr (BRANCH)
      return row_of_sums<ROWS>(r);
    else
      return row_at<Format>(call.stream, r);
  }

  template <int ROWS>
  Moments first_pass(int64_t r) const {
    if constexpr (!BRANCH) return moments<Source, CENTERED, false>(source<ROWS>(r), width, 0.0f);
    const Moments of = add_branch<ROWS, Rounding::bounded>(r);
    return of.squares < INFINITE ? of : add_branch<ROWS, Rounding::exact>(r);
  }

  template <int ROWS>
  void prepare(int64_t r, Statistics (&of)[ROWS]) const {
    for (int i = 0; i < ROWS; i++) {
      of[i] = statistics<Source, CENTERED>(first_pass<ROWS>(r + i), source<ROWS>(r + i), width, call.shape.eps);
      if constexpr (CENTERED) call.mean[r + i] = of[i].origin + of[i].shift;
      call.rstd[r + i] = of[i].rstd;
    }
  }

  template <int ROWS>
  void finish(int64_t r, const Statistics (&of)[ROWS]) const {
    bool bounded = weights.bounded;
    for (int i = 0; i < ROWS; i++) bounded &= is_bounded(of[i]);
    bounded ? normalize<ROWS, Rounding::bounded>(r, of) : normalize<ROWS, Rounding::exact>(r, of);
  }

  template <int ROWS>
  void run(int64_t r, int64_t stop) const {
    if (r == stop) return;
    Statistics of[2][ROWS];
    int now = 0;
    prepare<ROWS>(r, of[now]);
    for (; r < stop; r += ROWS, now = 1 - now) {
      if (r + ROWS < stop) prepare<ROWS>(r + ROWS, of[1 - now]);
      finish<ROWS>(r, of[now]);
    }
  }

 public:
  Forward(const NormForward& call, const Weights& weights, int64_t begin, int64_t end)
      : call(call),
        weights(weights),
        scratch(call.shape.width, BRANCH ? 2 * ROWS_AT_ONCE : 0),
        begin(begin),
        end(end),
        width(call.shape.width) {}

  void run() const {
    const int64_t together = width >= NORM_WIDE_ROW ? (end - begin) / ROWS_AT_ONCE * ROWS_AT_ONCE : 0;
    run<ROWS_AT_ONCE>(begin, begin + together);
    run<1>(begin + together, end);
    if constexpr (STORES == Stores::streamed) finish_streaming();
  }
};

template <class Format, bool CENTERED, bool BRANCH>
void forward(const NormForward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const float* weight = widened<Format>(call.weight, shape.weight_dtype, shape.width, 1.0f, call.workspace);
  const float* bias = widened<Format>(call.bias, shape.weight_dtype, shape.width, 0.0f, call.workspace + shape.width);
  const bool bounded = are_bounded<Format>(weight, shape.width) && are_bounded<Format>(bias, shape.width);
  const Weights weights = {weight, bias, bounded};
  const bool streamed = streams<Format>(shape, call.normalized, call.summed);
  const int64_t rows = norm_task_rows(shape, threads.count);
  deal(ceiling(shape.rows, rows), threads, [&](int64_t task) {
    const int64_t begin = task * rows, end = smaller(begin + rows, shape.rows);
    if (streamed) {
      Forward<Format, CENTERED, BRANCH, Stores::streamed>(call, weights, begin, end).run();
    } else {
      Forward<Format, CENTERED, BRANCH, Stores::cached>(call, weights, begin, end).run();
    }
  });
}

template <class Format>
void forward(const NormForward& call, const Threads& threads) {
  if (call.shape.centered) {
    call.branch.data ? forward<Format, true, true>(call, threads) : forward<Format, true, false>(call, threads);
  } else {
    call.branch.data ? forward<Format, false, true>(call, threads) : forward<Format, false, false>(call, threads);
  }
}

}  // namespace

void norm_forward(const NormForward& call, const Threads& threads) {
  switch (call.shape.dtype) {
    case Dtype::float32: return forward<Float32>(call, threads);
    case Dtype::bfloat16: return forward<BFloat16>(call, threads);
    case Dtype::float16: return forward<Float16>(call, threads);
  }
}

}  // namespace trilby::TRILBY_LEVEL
