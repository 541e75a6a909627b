// Layer norm and RMS norm, backward, on one instruction-set level; with a residual branch, dropped out or not.
//
// With u = (summed - mean) · rstd and g = grad_normalized · weight, over a row of width N:
//     grad_stream = (g - sum(g) / N - u · sum(g · u) / N) · rstd + grad_summed       sum(g) = 0 for an RMS norm
//     grad_branch = dropout(grad_stream)
//     grad_weight = sum over rows of grad_normalized · u,   grad_bias = sum over rows of grad_normalized
//
// A row is read from memory once: the second pass over it finds it in the first-level cache, while the next row is
// fetched. Traffic an element: two reads and one write, one read more with grad_summed, one write more with dropout.
//
// The weight gradients are summed in fp32 over chunks of rows, and then over the chunks in their order: the same order
// for any number of threads, no lock and no atomic addition.
#include "norm.h"

namespace trilby::TRILBY_LEVEL {

namespace {

template <class Format>
struct Row {
  const typename Format::Element *grad_normalized, *grad_summed, *summed;
  float mean, rstd;

  Row(const NormBackward& call, int64_t r)
      : grad_normalized(row_at<Format>(call.grad_normalized, r)),
        grad_summed(call.grad_summed.data ? row_at<Format>(call.grad_summed, r) : nullptr),
        summed(row_at<Format>(call.summed, r)),
        mean(call.shape.centered ? call.mean[r] : 0.0f),
        rstd(call.rstd[r]) {}

  template <class Step>
  Vector unit(int64_t column, Step step) const {
    return only_elements((load_at<Format>(summed + column, step) - mean) * rstd, step);
  }
};

// Means over a row, and its share of the weight gradients.
struct Means {
  float g, gu;  // of g and of g · u
};

template <class Format, bool CENTERED>
Means add_weight_gradients(const Row<Format>& row, const float* weight, float* grad_weight, float* grad_bias,
                           int64_t width) {
  Vector sum_g[CHAINS] = {}, sum_gu[CHAINS] = {};
  walk(width, [&](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    const Vector grad = load_at<Format>(row.grad_normalized + column, step);
    const Vector unit = row.unit(column, step);
    const Vector grad_unit = grad * unit;
    const Vector scale = load_at<Float32>(weight + column, step);
    if constexpr (CENTERED) sum_g[chain] += grad * scale;
    sum_gu[chain] += grad_unit * scale;
    store_at<Float32>(grad_weight + column, load_at<Float32>(grad_weight + column, step) + grad_unit, step);
    store_at<Float32>(grad_bias + column, load_at<Float32>(grad_bias + column, step) + grad, step);
  });
  const float count = static_cast<float>(width);
  return {CENTERED ? total(sum_g) / count : 0.0f, total(sum_gu) / count};
}

struct InputGradients {
  void *stream, *branch;       // branch: null without dropout
  const float* factors;        // of dropout
};

template <class Format, Stores STORES>
void input_gradients(const Row<Format>& row, const Row<Format>& next, const Means& means, const float* weight,
                     const InputGradients& to, int64_t width) {
  using Element = typename Format::Element;
  walk(width, [&](int64_t column, auto step, int) __attribute__((always_inline)) {
    __builtin_prefetch(next.grad_normalized + column);
    __builtin_prefetch(next.summed + column);
    const Vector g = load_at<Format>(row.grad_normalized + column, step) * load_at<Float32>(weight + column, step);
    Vector gradient = (g - means.g - row.unit(column, step) * means.gu) * row.rstd;
    if (row.grad_summed) gradient += load_at<Format>(row.grad_summed + column, step);
    store_at<Format, STORES>(static_cast<Element*>(to.stream) + column, gradient, step);
    if (to.branch) {
      const Vector dropped = gradient * load_at<Float32>(to.factors + column, step);
      store_at<Format, STORES>(static_cast<Element*>(to.branch) + column, dropped, step);
    }
  });
}

template <class Format, bool CENTERED, Stores STORES>
void backward_rows(const NormBackward& call, const float* weight, float* grad_weight, float* grad_bias, int64_t begin,
                   int64_t end) {
  using Element = typename Format::Element;
  const int64_t width = call.shape.width;
  const RowScratch scratch(width);
  for (int64_t i = 0; i < width; i++) grad_weight[i] = grad_bias[i] = 0.0f;
  for (int64_t r = begin; r < end; r++) {
    const Row<Format> row(call, r), next(call, r + 1 < end ? r + 1 : r);
    const Means means = add_weight_gradients<Format, CENTERED>(row, weight, grad_weight, grad_bias, width);
    if (call.grad_branch) dropout_factors(call.dropout, r, width, scratch.factors);
    Element* branch = call.grad_branch ? static_cast<Element*>(call.grad_branch) + r * width : nullptr;
    input_gradients<Format, STORES>(row, next, means, weight,
                                    {static_cast<Element*>(call.grad_stream) + r * width, branch, scratch.factors},
                                    width);
  }
  if constexpr (STORES == Stores::streamed) finish_streaming();
}

template <class Format>
void round_sums(const float* sums, void* to, int64_t begin, int64_t count) {
  auto* elements = static_cast<typename Format::Element*>(to) + begin;
  walk(count, [&](int64_t i, auto step, int) {
    store_at<Format>(elements + i, load_at<Float32>(sums + begin + i, step), step);
  });
}

// Adds the partial sums [chunks][2][width] up in the first of them, column block by column block, and rounds them once.
void reduce_weight_gradients(const NormBackward& call, float* partial, int64_t chunks, const Threads& threads) {
  constexpr int64_t BLOCK = 1024;
  const int64_t width = call.shape.width;
  const int64_t blocks = ceiling(width, BLOCK);
  void* const results[2] = {call.grad_weight, call.grad_bias};
  deal(2 * blocks, threads, [&](int64_t task) {
    void* const result = results[task / blocks];
    if (!result) return;
    float* sums = partial + task / blocks * width;
    const int64_t begin = task % blocks * BLOCK, count = smaller(BLOCK, width - begin);
    for (int64_t chunk = 1; chunk < chunks; chunk++) {
      const float* more = sums + chunk * 2 * width + begin;
      walk(count, [&](int64_t i, auto step, int) {
        store_at<Float32>(sums + begin + i, load_at<Float32>(sums + begin + i, step) + load_at<Float32>(more + i, step),
                          step);
      });
    }
    switch (call.shape.weight_dtype) {
      case Dtype::float32: return round_sums<Float32>(sums, result, begin, count);
      case Dtype::bfloat16: return round_sums<BFloat16>(sums, result, begin, count);
      case Dtype::float16: return round_sums<Float16>(sums, result, begin, count);
    }
  });
}

template <class Format, bool CENTERED>
void backward(const NormBackward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const int64_t width = shape.width, chunks = norm_chunks(shape.rows), rows = norm_chunk_rows(shape.rows);
  const float* weight = weight_as_floats(call.weight, shape.weight_dtype, width, 1.0f, call.workspace);
  float* partial = call.workspace + width;  // [chunks][2][width]
  const bool streamed = stores_for<Format>(shape, call.grad_stream, call.grad_branch) == Stores::streamed;
  deal(chunks, threads, [&](int64_t chunk) {
    float *grad_weight = partial + 2 * chunk * width, *grad_bias = grad_weight + width;
    const int64_t begin = chunk * rows, end = smaller(begin + rows, shape.rows);
    if (streamed) {
      backward_rows<Format, CENTERED, Stores::streamed>(call, weight, grad_weight, grad_bias, begin, end);
    } else {
      backward_rows<Format, CENTERED, Stores::cached>(call, weight, grad_weight, grad_bias, begin, end);
    }
  });
  reduce_weight_gradients(call, partial, chunks, threads);
}

template <class Format>
void backward(const NormBackward& call, const Threads& threads) {
  call.shape.centered ? backward<Format, true>(call, threads) : backward<Format, false>(call, threads);
}

}  // namespace

void norm_backward(const NormBackward& call, const Threads& threads) {
  switch (call.shape.dtype) {
    case Dtype::float32: return backward<Float32>(call, threads);
    case Dtype::bfloat16: return backward<BFloat16>(call, threads);
    case Dtype::float16: return backward<Float16>(call, threads);
  }
}

}  // namespace trilby::TRILBY_LEVEL
