// Layer norm and RMS norm, forward, on one instruction-set level; with a residual branch, dropped out or not, added
// first.
//
//     summed = stream + dropout(branch)                        only with a branch
//     normalized = (summed - mean) · rstd · weight + bias      mean = 0 for an RMS norm
//
// A row is read from memory once: its normalization finds it in the cache. The statistics of a row are taken before the
// row above it is normalized, so that neither waits for the other, and the row below it is fetched meanwhile.
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

struct Moments {
  float shift, variance;
};

// Of deviations from `origin`, or with ORIGIN false of the elements themselves.
template <class Source, bool SHIFT, bool ORIGIN>
Moments moments(const typename Source::Element* row, int64_t width, float origin) {
  Pair sums[CHAINS] = {}, squares[CHAINS] = {};
  walk(width, [=, &sums, &squares](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    Pair element = load_pair<Source>(row + column, step);
    if constexpr (ORIGIN) element = only_columns(element - origin, step);
    if constexpr (SHIFT) sums[chain] = sums[chain] + element;
    squares[chain] = squares[chain] + element * element;
  });
  const float count = static_cast<float>(width);
  const float shift = SHIFT ? total(sums) / count : 0.0f;
  const float variance = total(squares) / count - shift * shift;
  return {shift, variance < 0.0f ? 0.0f : variance};
}

float reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <class Source, bool CENTERED>
Statistics statistics(const typename Source::Element* row, int64_t width, float eps) {
  float origin = 0.0f;
  Moments of = moments<Source, CENTERED, false>(row, width, origin);
  // A variance that is a difference loses a factor of 1 + shift² / variance: up to here 1.25, a third of a bit. One
  // pass mends that; a second one does where a sum of 65,537 elements of 10⁶ was itself off by more than the deviation.
  for (int passes = 0; passes < 2 && of.shift * of.shift > 0.25f * of.variance; passes++) {
    origin += of.shift;
    of = moments<Source, true, true>(row, width, origin);
  }
  return {origin, of.shift, reciprocal_root(of.variance + eps)};
}

struct Weights {
  const float *weight, *bias;  // in pair order
};

// Rows of the input that are read soon; null where there is no branch.
template <class Format>
struct Ahead {
  const typename Format::Element *stream, *branch;
};

// Without ORIGIN the origin is 0.
template <class Source, class Format, Stores STORES, bool ORIGIN>
void normalize(const typename Source::Element* row, const Statistics of, const Weights weights,
               typename Format::Element* normalized, const Ahead<Format> ahead, int64_t width) {
  const float offset = -of.shift * of.rstd;
  walk(width, [=](int64_t column, auto step, int) __attribute__((always_inline)) {
    fetch<NEAREST>(ahead.stream + column);
    if (ahead.branch) fetch<NEAREST>(ahead.branch + column);
    const Pair element = load_pair<Source>(row + column, step);
    const Pair unit = (ORIGIN ? element - of.origin : element) * of.rstd + offset;
    const Pair scaled =
        unit * load_pair<Float32>(weights.weight + column, step) + load_pair<Float32>(weights.bias + column, step);
    store_pair<Format, STORES>(normalized + column, scaled, step);
  });
}

// What is normalized is the sum as it is stored: the backward reads that again.
template <class Format, Stores STORES>
void add_branch(const typename Format::Element* stream, const typename Format::Element* branch, const float* factors,
                typename Format::Element* summed, float* row, int64_t width) {
  walk(width, [=](int64_t column, auto step, int) __attribute__((always_inline)) {
    Pair added = load_pair<Format>(branch + column, step);
    if (factors)
      added = added * to_pair_order<Format, decltype(step)>(load_in_order<Float32>(factors + column, step), step);
    const Pair sum = rounded(Format{}, load_pair<Format>(stream + column, step) + added);
    store_pair<Format, STORES>(summed + column, sum, step);
    store_in_order<Float32>(row + column, sum, step);
  });
}

template <class Format, bool CENTERED, bool BRANCH, Stores STORES>
class Forward {
  using Element = typename Format::Element;
  using Source = std::conditional_t<BRANCH, Float32, Format>;

  const NormForward& call;
  const Weights weights;
  const RowScratch scratch;
  const int64_t begin, end, width;

  template <bool ORIGIN>
  void normalize_row(int64_t r, const Statistics& of) const {
    const int64_t soon = smaller(r + 2, end - 1);
    const Ahead<Format> ahead = {row_at<Format>(call.stream, soon),
                                 BRANCH ? row_at<Format>(call.branch, soon) : nullptr};
    normalize<Source, Format, STORES, ORIGIN>(source(r), of, weights,
                                              static_cast<Element*>(call.normalized) + r * width, ahead, width);
  }

  const typename Source::Element* source(int64_t r) const {
    if constexpr (BRANCH)
      return scratch.rows[r % 2];
    else
      return row_at<Format>(call.stream, r);
  }

  Statistics prepare(int64_t r) const {
    if constexpr (BRANCH) {
      if (call.dropout.threshold) dropout_factors(call.dropout, r, width, scratch.factors);
      add_branch<Format, STORES>(row_at<Format>(call.stream, r), row_at<Format>(call.branch, r),
                                 call.dropout.threshold ? scratch.factors : nullptr,
                                 static_cast<Element*>(call.summed) + r * width, scratch.rows[r % 2], width);
    }
    return statistics<Source, CENTERED>(source(r), width, call.shape.eps);
  }

 public:
  Forward(const NormForward& call, const Weights& weights, int64_t begin, int64_t end)
      : call(call), weights(weights), scratch(call.shape.width), begin(begin), end(end), width(call.shape.width) {}

  void run() const {
    Statistics of = prepare(begin);
    for (int64_t r = begin; r < end; r++) {
      const Statistics next = r + 1 < end ? prepare(r + 1) : of;
      of.origin == 0.0f ? normalize_row<false>(r, of) : normalize_row<true>(r, of);
      if constexpr (CENTERED) call.mean[r] = of.origin + of.shift;
      call.rstd[r] = of.rstd;
      of = next;
    }
    if constexpr (STORES == Stores::streamed) finish_streaming();
  }
};

template <class Format, bool CENTERED, bool BRANCH>
void forward(const NormForward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const Weights weights = {
      widened<Format>(call.weight, shape.weight_dtype, shape.width, 1.0f, call.workspace),
      widened<Format>(call.bias, shape.weight_dtype, shape.width, 0.0f, call.workspace + shape.width)};
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
