// Layer norm and RMS norm, backward, on one instruction-set level; with a residual branch, dropped out or not.
//
// With d = summed - mean, u = d · rstd and g = grad_normalized · weight, over a row of width N:
//     grad_stream = (g - sum(g) / N - u · sum(g · u) / N) · rstd + grad_summed       sum(g) = 0 for an RMS norm
//     grad_branch = dropout(grad_stream)
//     grad_weight = sum over rows of grad_normalized · u,   grad_bias = sum over rows of grad_normalized
//
// A row is read from memory once: the second pass over it finds it in the cache. The sums of a row are taken before the
// second pass over the row above it, so that neither waits for the other, and the row below it is fetched meanwhile.
// Traffic an element: two reads and one write, one read more with grad_summed, one write more with dropout.
//
// The weight gradients are summed in fp32 over chunks of rows, and then over the chunks as a tree: the same order for
// any number of threads, no lock and no atomic addition.
#include "norm.h"

namespace trilby::TRILBY_LEVEL {

namespace {

// Means of g and of g · d over a row.
struct Means {
  float g, gd;
};

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
};

// Partial sums over the rows of a chunk, in pair order.
struct WeightGradients {
  float *weight, *bias;
};

template <class Format, bool CENTERED>
Means add_weight_gradients(const Row<Format> row, const float* weight, const WeightGradients to, int64_t width) {
  Pair sums_g[CHAINS] = {}, sums_gd[CHAINS] = {};
  walk(width, [=, &sums_g, &sums_gd](int64_t column, auto step, int chain) __attribute__((always_inline)) {
    const Pair grad = load_pair<Format>(row.grad_normalized + column, step);
    const Pair moment = grad * (load_pair<Format>(row.summed + column, step) - row.mean);
    const Pair scale = load_pair<Float32>(weight + column, step);  // 0 past the row's end
    if constexpr (CENTERED) sums_g[chain] = sums_g[chain] + grad * scale;
    sums_gd[chain] = sums_gd[chain] + moment * scale;
    store_pair<Float32>(to.weight + column, load_pair<Float32>(to.weight + column, step) + moment * row.rstd, step);
    store_pair<Float32>(to.bias + column, load_pair<Float32>(to.bias + column, step) + grad, step);
  });
  const float count = static_cast<float>(width);
  return {CENTERED ? total(sums_g) / count : 0.0f, total(sums_gd) / count};
}

template <class Format>
struct InputGradients {
  typename Format::Element *stream, *branch;  // branch: null without dropout
  const float* factors;                       // of dropout, in memory order
};

template <class Format, Stores STORES>
void input_gradients(const Row<Format> row, const Row<Format> ahead, const Means means, const float* weight,
                     const InputGradients<Format> to, int64_t width) {
  // Into the second level: three rows at once would crowd the first (7 % faster measured at (8192, 1600), fp32).
  const float slope = means.gd * row.rstd * row.rstd * row.rstd;
  walk(width, [=](int64_t column, auto step, int) __attribute__((always_inline)) {
    fetch<NEAR>(ahead.grad_normalized + column);
    fetch<NEAR>(ahead.summed + column);
    const Pair g = load_pair<Format>(row.grad_normalized + column, step) * load_pair<Float32>(weight + column, step);
    const Pair deviation = load_pair<Format>(row.summed + column, step) - row.mean;
    Pair gradient = (g - means.g) * row.rstd - deviation * slope;
    if (row.grad_summed) {
      fetch<NEAR>(ahead.grad_summed + column);
      gradient = gradient + load_pair<Format>(row.grad_summed + column, step);
    }
    store_pair<Format, STORES>(to.stream + column, gradient, step);
    if (to.branch) {
      const Pair factors = load_in_order<Float32>(to.factors + column, step);
      store_pair<Format, STORES>(to.branch + column, gradient * to_pair_order<Format, decltype(step)>(factors, step),
                                 step);
    }
  });
}

template <class Format, bool CENTERED, Stores STORES>
void backward_rows(const NormBackward& call, const float* weight, const WeightGradients& sums, int64_t begin,
                   int64_t end) {
  using Element = typename Format::Element;
  const int64_t width = call.shape.width;
  const RowScratch scratch(width);
  for (int64_t i = 0; i < width; i++) sums.weight[i] = sums.bias[i] = 0.0f;
  Means means = {0.0f, 0.0f};
  if (begin < end) means = add_weight_gradients<Format, CENTERED>(Row<Format>(call, begin), weight, sums, width);
  for (int64_t r = begin; r < end; r++) {
    Means next = means;
    if (r + 1 < end) next = add_weight_gradients<Format, CENTERED>(Row<Format>(call, r + 1), weight, sums, width);
    if (call.grad_branch) dropout_factors(call.dropout, r, width, scratch.factors);
    const InputGradients<Format> to = {static_cast<Element*>(call.grad_stream) + r * width,
                                       call.grad_branch ? static_cast<Element*>(call.grad_branch) + r * width : nullptr,
                                       scratch.factors};
    const Row<Format> ahead(call, smaller(r + 2, end - 1));
    input_gradients<Format, STORES>(Row<Format>(call, r), ahead, means, weight, to, width);
    means = next;
  }
  if constexpr (STORES == Stores::streamed) finish_streaming();
}

// Adds the partial sums of every chunk up in the first, neighbors first: errors grow with the tree's 7 levels, not with
// its 128 leaves.
void add_chunks(float* sums, int64_t chunks, int64_t chunk_stride, int64_t columns) {
  for (int64_t span = 1; span < chunks; span *= 2) {
    for (int64_t chunk = 0; chunk + span < chunks; chunk += 2 * span) {
      float* to = sums + chunk * chunk_stride;
      const float* more = to + span * chunk_stride;
      walk(columns, [=](int64_t i, auto step, int) {
        store_pair<Float32>(to + i, load_pair<Float32>(to + i, step) + load_pair<Float32>(more + i, step), step);
      });
    }
  }
}

template <class Format, class WeightFormat>
void round_sums(const float* sums, void* to, int64_t begin, int64_t columns) {
  auto* elements = static_cast<typename WeightFormat::Element*>(to) + begin;
  walk(columns, [=](int64_t i, auto step, int) {
    const Pair pair = to_memory_order<Format, decltype(step)>(load_pair<Float32>(sums + i, step), step);
    store_in_order<WeightFormat>(elements + i, pair, step);
  });
}

// From the partial sums [chunks][2][width] to the gradients of weight and bias, a block of columns at a time.
template <class Format>
void reduce_weight_gradients(const NormBackward& call, float* partial, int64_t chunks, const Threads& threads) {
  constexpr int64_t BLOCK = 1024;  // columns; a multiple of PAIR, so that pair order holds in every block
  const int64_t width = call.shape.width, blocks = ceiling(width, BLOCK);
  void* const results[2] = {call.grad_weight, call.grad_bias};
  deal(2 * blocks, threads, [&](int64_t task) {
    void* const result = results[task / blocks];
    if (!result) return;
    const int64_t begin = task % blocks * BLOCK, columns = smaller(BLOCK, width - begin);
    float* sums = partial + task / blocks * width + begin;
    add_chunks(sums, chunks, 2 * width, columns);
    switch (call.shape.weight_dtype) {
      case Dtype::float32: return round_sums<Format, Float32>(sums, result, begin, columns);
      case Dtype::bfloat16: return round_sums<Format, BFloat16>(sums, result, begin, columns);
      case Dtype::float16: return round_sums<Format, Float16>(sums, result, begin, columns);
    }
  });
}

template <class Format, bool CENTERED>
void backward(const NormBackward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const int64_t width = shape.width, chunks = norm_chunks(shape.rows), rows = norm_chunk_rows(shape.rows);
  const float* weight = widened<Format>(call.weight, shape.weight_dtype, width, 1.0f, call.workspace);
  float* partial = call.workspace + width;  // [chunks][2][width]
  const bool streamed = streams<Format>(shape, call.grad_stream, call.grad_branch);
  deal(chunks, threads, [&](int64_t chunk) {
    const WeightGradients sums = {partial + 2 * chunk * width, partial + (2 * chunk + 1) * width};
    const int64_t begin = chunk * rows, end = smaller(begin + rows, shape.rows);
    if (streamed) {
      backward_rows<Format, CENTERED, Stores::streamed>(call, weight, sums, begin, end);
    } else {
      backward_rows<Format, CENTERED, Stores::cached>(call, weight, sums, begin, end);
    }
  });
  reduce_weight_gradients<Format>(call, partial, chunks, threads);
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
