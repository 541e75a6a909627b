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
// How near that is to the machine, two threads, sizes of a GPT: a loop of the same reads and streamed writes, each row
// read twice, that computes nothing takes 0.97 to 0.99 of the time in fp32 (0.76 at 12288 columns), 0.64 to 0.67 in
// bf16. Of bf16, arithmetic in the cache takes as long as memory does (14 cycles for 32 columns each), and they overlap
// by half. What did not help: other distances, caches and shares of lines for the fetches; no fetches (0.86 to 1.03);
// both passes in one loop, a row apart (0.95 to 1.08).
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
template <class Format, bool SHIFT, bool ORIGIN>
CALLED Moments moments(const typename Format::Element* row, int64_t width, float origin) {
  Pair sums[CHAINS] = {}, squares[CHAINS] = {};
  walk<CHAINS>(width, [=, &sums, &squares](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    Pair element = load_pair<Format>(row + column, step);
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

// A variance that is a difference loses a factor of 1 + shift² / variance: up to this share 1.25, a third of a bit.
constexpr float MOST_LOST = 0.25f;

template <class Format>
Statistics statistics(const Moments& of, const typename Format::Element* row, const NormShape& shape) {
  const float count = static_cast<float>(shape.width);
  float origin = 0.0f, shift = shape.centered ? of.sum / count : 0.0f, variance = variance_of(of, shift, count);
  // One pass of deviations mends what a difference lost; a second one does where a sum of 65,537 elements of 10⁶ was
  // itself off by more than the deviation.
  for (int passes = 0; passes < 2 && shift * shift > MOST_LOST * variance; passes++) {
    origin += shift;
    const Moments from = moments<Format, true, true>(row, shape.width, origin);
    shift = from.sum / count;
    variance = variance_of(from, shift, count);
  }
  return {origin, shift, 1.0f / __builtin_sqrtf(variance + shape.eps)};
}

// In pair order.
struct Weights {
  const float *weight, *bias;
};

// Narrow rows without a branch, LANES at a time: what is computed once a row (two sums across lanes, two divisions, a
// square root) is computed in a register that holds a row in each lane. What a row comes to does not depend on the
// others. Measured on AVX2, one thread: fp32 rows of 16, 32, 64, 100 and 256 columns 3.5, 3.1, 2.2, 1.9 and 1.6 times
// as fast as one by one; of 768, 0.85.
template <class Format, Stores STORES>
CALLED void normalize_narrow(const NormForward& call, const Weights& weights, int64_t begin, int64_t end) {
  using Element = typename Format::Element;
  const NormShape& shape = call.shape;
  const int64_t width = shape.width;
  for (int64_t r = begin; r < end; r += LANES) {
    const int64_t rows = smaller(LANES, end - r);
    const Element* from[LANES];
    Vector sums[LANES], squares[LANES];
    for (int64_t i = 0; i < LANES; i++) {
      const Element* row = from[i] = row_at<Format>(call.stream, r + smaller(i, rows - 1));
      Pair sum = {}, square = {};
      walk(width, [=, &sum, &square](int64_t column, auto step, int) __attribute__((always_inline)) {
        const Pair element = load_pair<Format>(row + column, step);
        sum = sum + element;
        square = square + element * element;
      });
      sums[i] = sum.first + sum.second;
      squares[i] = square.first + square.second;
    }
    const float count = static_cast<float>(width);
    const Vector sum = horizontal_sums(sums), square = horizontal_sums(squares);
    const Vector shift = shape.centered ? sum / count : Vector{}, difference = square / count - shift * shift;
    const Vector variance = difference < 0.0f ? Vector{} : difference;
    float origin[LANES] = {}, means[LANES], shifts[LANES], rstd[LANES];
    store(shifts, shift);
    store(rstd, 1.0f / square_root(variance + shape.eps));
    for (int64_t i = 0; i < rows; i++) {
      if (shift[i] * shift[i] > MOST_LOST * variance[i]) {
        const Statistics exact = statistics<Format>({sum[i], square[i]}, from[i], shape);
        origin[i] = exact.origin;
        shifts[i] = exact.shift;
        rstd[i] = exact.rstd;
      }
      means[i] = origin[i] + shifts[i];
    }
    if (shape.centered) store_some<Float32>(call.mean + r, load(means), rows);
    store_some<Float32>(call.rstd + r, load(rstd), rows);
    for (int64_t i = 0; i < rows; i++) {
      const Element* row = from[i];
      Element* normalized = static_cast<Element*>(call.normalized) + (r + i) * width;
      walk(width, [=, from = origin[i], offset = -shifts[i] * rstd[i], factor = rstd[i]](
                      int64_t column, auto step, int) __attribute__((always_inline)) {
        const Pair unit = (load_pair<Format>(row + column, step) - from) * factor + offset;
        const Pair scaled = unit * load_pair<Float32>(weights.weight + column, step);
        store_pair<Format, STORES>(normalized + column, scaled + load_pair<Float32>(weights.bias + column, step), step);
      });
    }
  }
}

template <class Format, bool BRANCH, Stores STORES>
class Forward {
  using Element = typename Format::Element;

  const NormForward& call;
  const Weights weights;
  const int64_t begin, end, width;
  const RowScratch scratch;  // dropout's factors, and copies of the sums that are streamed

  // Adds the branch to row r, and takes the sum's moments. What is normalized is the sum as it is stored: the backward
  // reads that again.
  template <bool CENTERED>
  CALLED Moments add_branch(int64_t r) const {
    const Element *stream = row_at<Format>(call.stream, r), *branch = row_at<Format>(call.branch, r);
    Element* const summed = static_cast<Element*>(call.summed) + r * width;
    Element* const copy = const_cast<Element*>(source(r));
    const float* const factors = scratch.rows[0];
    const bool drops = call.dropout.threshold != 0;
    if (drops) dropout_factors(call.dropout, r, width, scratch.rows[0]);
    Pair sums[CHAINS] = {}, squares[CHAINS] = {};
    walk<CHAINS>(width, [=, &sums, &squares](int64_t column, auto step, int chain) __attribute__((always_inline)) {
      Pair added = load_pair<Format>(branch + column, step);
      if (drops) {
        const Pair kept = load_in_order<Float32>(factors + column, step);
        added = added * to_pair_order<Format, decltype(step)>(kept, step);
      }
      const Pair exact = load_pair<Format>(stream + column, step) + added;
      const Pair sum = stored_pair<Format, STORES>(summed + column, copy + column, exact, step);
      if constexpr (CENTERED) sums[chain] = sums[chain] + sum;
      squares[chain] = squares[chain] + sum * sum;
    });
    return moments_of(sums, squares);
  }

  // Normalizes rows r, r + 1, …, and starts to fetch as many that follow the next ones.
  template <int ROWS, bool ORIGIN>
  CALLED void normalize(int64_t r, const Statistics* of) const {
    const Element *rows[ROWS], *stream[ROWS], *branch[ROWS];
    Element* normalized[ROWS];
    float origin[ROWS], offset[ROWS], rstd[ROWS];
    for (int i = 0; i < ROWS; i++) {
      const int64_t ahead = smaller(r + 2 * ROWS + i, end - 1);
      rows[i] = source(r + i);
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
        Pair element = load_pair<Format>(rows[i] + column, step);
        if constexpr (ORIGIN) element = element - origin[i];
        const Pair unit = element * rstd[i] + offset[i];
        store_pair<Format, STORES>(normalized[i] + column, unit * scale + added, step);
      }
    });
  }

  // Where row r is read from a second time: the sum where it was stored, but a streamed one has left the cache.
  const Element* source(int64_t r) const {
    if constexpr (!BRANCH) return row_at<Format>(call.stream, r);
    if constexpr (STORES == Stores::cached) return static_cast<const Element*>(call.summed) + r * width;
    return reinterpret_cast<const Element*>(scratch.rows[1 + (r - begin) % (2 * FORWARD_ROWS<Format>)]);
  }

  Moments first_pass(int64_t r) const {
    if constexpr (BRANCH) return call.shape.centered ? add_branch<true>(r) : add_branch<false>(r);
    const Element* row = source(r);
    return call.shape.centered ? moments<Format, true, false>(row, width, 0.0f)
                               : moments<Format, false, false>(row, width, 0.0f);
  }

  template <int ROWS>
  void prepare(int64_t r, Statistics* of) const {
    for (int i = 0; i < ROWS; i++) {
      of[i] = statistics<Format>(first_pass(r + i), source(r + i), call.shape);
      if (call.shape.centered) call.mean[r + i] = of[i].origin + of[i].shift;
      call.rstd[r + i] = of[i].rstd;
    }
  }

  template <int ROWS>
  void finish(int64_t r, const Statistics* of) const {
    bool centered = true;
    for (int i = 0; i < ROWS; i++) centered &= of[i].origin == 0.0f;
    if (centered) return normalize<ROWS, false>(r, of);
    for (int i = 0; i < ROWS; i++) normalize<1, true>(r + i, of + i);
  }

  static void finished() {
    if constexpr (STORES == Stores::streamed) finish_streaming();
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
        begin(begin),
        end(end),
        width(call.shape.width),
        scratch(width, !BRANCH                    ? 0
                       : STORES == Stores::cached ? 1
                                                  : 1 + 2 * FORWARD_ROWS<Format>) {}

  void run() const {
    constexpr int ROWS = FORWARD_ROWS<Format>;
    if constexpr (!BRANCH) {
      if (width <= NORM_NARROW_ROW) {
        normalize_narrow<Format, STORES>(call, weights, begin, end);
        return finished();
      }
    }
    const int64_t together = ROWS > 1 && width >= NORM_WIDE_ROW ? (end - begin) / ROWS * ROWS : 0;
    if constexpr (ROWS > 1) run<ROWS>(begin, begin + together);
    run<1>(begin + together, end);
    finished();
  }
};

template <class Format, bool BRANCH>
void forward(const NormForward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const Weights weights = {
      widened<Format>(call.weight, shape.weight_dtype, shape.width, 1.0f, call.workspace),
      widened<Format>(call.bias, shape.weight_dtype, shape.width, 0.0f, call.workspace + shape.width)};
  const Results<Format> results(shape, call.normalized, call.summed);
  const int64_t rows = norm_task_rows(shape, threads.count);
  deal(ceiling(shape.rows, rows), threads, [&](int64_t task) {
    const int64_t begin = task * rows, end = smaller(begin + rows, shape.rows);
    results.prepare(begin, end);
    if (results.are_streamed()) {
      Forward<Format, BRANCH, Stores::streamed>(call, weights, begin, end).run();
    } else {
      Forward<Format, BRANCH, Stores::cached>(call, weights, begin, end).run();
    }
  });
}

template <class Format>
void forward(const NormForward& call, const Threads& threads) {
  call.branch.data ? forward<Format, true>(call, threads) : forward<Format, false>(call, threads);
}

}  // namespace

void norm_forward(const NormForward& call, const Threads& threads) {
  in_format(call.shape.dtype, [&](auto format) { forward<decltype(format)>(call, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
