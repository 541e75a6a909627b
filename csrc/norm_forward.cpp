// Layer norm and RMS norm, forward, on one instruction-set level; with a residual branch, dropped out or not, added first.
//
//     summed = stream + dropout(branch)                        only with a branch
//     normalized = (summed - mean) · rstd · weight + bias      mean = 0 for an RMS norm
//
// A row is read from memory once: its statistics and its normalization pass over it again in the first-level cache,
// while the next row is fetched. Traffic an element: one read and one write, or two and two with a branch.
//
// The mean is summed, and then mended by the mean of the deviations from it, so that a mean of 10⁶ leaves the variance
// exact: deviations are taken first, x - mean is exact for x near the mean, and the rounding error of the mean is known.
#include "norm.h"

namespace trilby::TRILBY_LEVEL {

namespace {

struct Statistics {
  float mean, shift, rstd;  // the mean is mean + shift: `mean` is what deviations are taken from
};

template <class Source, bool CENTERED>
Statistics statistics(const typename Source::Element* row, int64_t width, float eps) {
  const float count = static_cast<float>(width);
  float mean = 0.0f;
  if constexpr (CENTERED) {
    Vector sums[CHAINS] = {};
    walk(width, [&](int64_t column, auto step, int chain) __attribute__((always_inline)) {
      sums[chain] += load_at<Source>(row + column, step);
    });
    mean = total(sums) / count;
  }
  Vector deviations[CHAINS] = {}, squares[CHAINS] = {};
  walk(width, [&](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    const Vector deviation = only_elements(load_at<Source>(row + column, step) - mean, step);
    if constexpr (CENTERED) deviations[chain] += deviation;
    squares[chain] += deviation * deviation;
  });
  const float shift = CENTERED ? total(deviations) / count : 0.0f;
  const float variance = total(squares) / count - shift * shift;
  return {mean, shift, 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

struct Weights {
  const float *weight, *bias;
};

// `next` is fetched along the way: it is the row after this one.
template <class Source, class Format, Stores STORES>
void normalize(const typename Source::Element* row, const Statistics& of, const Weights& weights,
               typename Format::Element* normalized, const typename Source::Element* next, int64_t width) {
  const float offset = -of.shift * of.rstd;
  walk(width, [&](int64_t column, auto step, int) __attribute__((always_inline)) {
    __builtin_prefetch(next + column);
    const Vector unit = (load_at<Source>(row + column, step) - of.mean) * of.rstd + offset;
    const Vector scaled = unit * load_at<Float32>(weights.weight + column, step) +
                          load_at<Float32>(weights.bias + column, step);
    store_at<Format, STORES>(normalized + column, scaled, step);
  });
}

// What is normalized is the sum as it is stored: the backward reads that again.
template <class Format, Stores STORES>
void add_branch(const typename Format::Element* stream, const typename Format::Element* branch, const float* factors,
                typename Format::Element* summed, float* row, int64_t width) {
  walk(width, [&](int64_t column, auto step, int) __attribute__((always_inline)) {
    Vector added = load_at<Format>(branch + column, step);
    if (factors) added *= load_at<Float32>(factors + column, step);
    const Vector sum = rounded(Format{}, load_at<Format>(stream + column, step) + added);
    store_at<Format, STORES>(summed + column, sum, step);
    store_at<Float32>(row + column, sum, step);
  });
}

template <class Format, bool CENTERED, Stores STORES>
void forward_rows(const NormForward& call, const Weights& weights, int64_t begin, int64_t end) {
  using Element = typename Format::Element;
  const int64_t width = call.shape.width;
  const RowScratch scratch(width);
  for (int64_t r = begin; r < end; r++) {
    Element* normalized = static_cast<Element*>(call.normalized) + r * width;
    const Element* stream = row_at<Format>(call.stream, r);
    const Element* next = row_at<Format>(call.stream, r + 1 < end ? r + 1 : r);
    Statistics of;
    if (call.branch.data) {
      if (call.dropout.threshold) dropout_factors(call.dropout, r, width, scratch.factors);
      add_branch<Format, STORES>(stream, row_at<Format>(call.branch, r),
                                 call.dropout.threshold ? scratch.factors : nullptr,
                                 static_cast<Element*>(call.summed) + r * width, scratch.row, width);
      of = statistics<Float32, CENTERED>(scratch.row, width, call.shape.eps);
      normalize<Float32, Format, STORES>(scratch.row, of, weights, normalized, scratch.row, width);
    } else {
      of = statistics<Format, CENTERED>(stream, width, call.shape.eps);
      normalize<Format, Format, STORES>(stream, of, weights, normalized, next, width);
    }
    if constexpr (CENTERED) call.mean[r] = of.mean + of.shift;
    call.rstd[r] = of.rstd;
  }
  if constexpr (STORES == Stores::streamed) finish_streaming();
}

template <class Format, bool CENTERED>
void forward(const NormForward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const Weights weights = {
      weight_as_floats(call.weight, shape.weight_dtype, shape.width, 1.0f, call.workspace),
      weight_as_floats(call.bias, shape.weight_dtype, shape.width, 0.0f, call.workspace + shape.width)};
  const bool streamed = stores_for<Format>(shape, call.normalized, call.summed) == Stores::streamed;
  const int64_t rows = norm_task_rows(shape.width);
  deal(ceiling(shape.rows, rows), threads, [&](int64_t task) {
    const int64_t begin = task * rows, end = smaller(begin + rows, shape.rows);
    if (streamed) {
      forward_rows<Format, CENTERED, Stores::streamed>(call, weights, begin, end);
    } else {
      forward_rows<Format, CENTERED, Stores::cached>(call, weights, begin, end);
    }
  });
}

template <class Format>
void forward(const NormForward& call, const Threads& threads) {
  call.shape.centered ? forward<Format, true>(call, threads) : forward<Format, false>(call, threads);
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
