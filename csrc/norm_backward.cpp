// Layer norm and RMS norm, backward, on one instruction-set level; with a residual branch, dropped out or not.
//
// With d = summed - mean, u = d · rstd and g = grad_normalized · weight, over a row of width N:
//     grad_stream = (g - sum(g) / N - u · sum(g · u) / N) · rstd + grad_summed       sum(g) = 0 for an RMS norm
//     grad_branch = dropout(grad_stream)
//     grad_weight = sum over rows of grad_normalized · u,   grad_bias = sum over rows of grad_normalized
//
// A row is read from memory once: the second pass over it finds it in the cache. The first pass takes several rows side
// by side; the second takes them one by one, along memory as the processor's own prefetching likes it, and fetches the
// rows of the next first pass meanwhile.
// Traffic an element: two reads and one write, one read more with grad_summed, one write more with dropout.
//
// A loop of the same reads and streamed writes that computes nothing takes 0.71 to 0.77 of the time in fp32 (0.67 at
// 12288 columns) and 0.54 to 0.61 in bf16, two threads. Fetching one tensor in the first pass and one in the second did
// not help (0.9 to 1.0).
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

  Row() = default;
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

// Adds rows r, r + 1, … to the sums, side by side: these are then loaded and stored once for all of the rows.
template <class Format, bool CENTERED, int ROWS>
CALLED void add_weight_gradients(const NormBackward& call, const float* weight, const WeightGradients& sums, int64_t r,
                                 Means* means) {
  Row<Format> rows[ROWS];
  Pair sums_g[ROWS], sums_gd[ROWS];
  for (int i = 0; i < ROWS; i++) {
    rows[i] = Row<Format>(call, r + i);
    sums_g[i] = sums_gd[i] = {Vector{}, Vector{}};  // not {} for the arrays: that is rep stos, see norm_forward.cpp
  }
  const int64_t width = call.shape.width;
  walk(width, [=, &sums_g, &sums_gd](int64_t column, auto step, int) __attribute__((always_inline)) {
    const Pair scale = load_pair<Float32>(weight + column, step);  // 0 past the row's end
    Pair grad_weight = load_pair<Float32>(sums.weight + column, step);
    Pair grad_bias = load_pair<Float32>(sums.bias + column, step);
    for (int i = 0; i < ROWS; i++) {
      const Pair grad = load_pair<Format>(rows[i].grad_normalized + column, step);
      const Pair moment = grad * (load_pair<Format>(rows[i].summed + column, step) - rows[i].mean);
      if constexpr (CENTERED) sums_g[i] = sums_g[i] + grad * scale;
      sums_gd[i] = sums_gd[i] + moment * scale;
      grad_weight = grad_weight + moment * rows[i].rstd;
      grad_bias = grad_bias + grad;
    }
    store_pair<Float32>(sums.weight + column, grad_weight, step);
    store_pair<Float32>(sums.bias + column, grad_bias, step);
  });
  const float count = static_cast<float>(width);
  for (int i = 0; i < ROWS; i++) means[i] = {CENTERED ? total(sums_g[i]) / count : 0.0f, total(sums_gd[i]) / count};
}

// Of row r; starts to fetch row `next`.
template <class Format, bool MORE, bool DROPPED, Stores STORES>
CALLED void input_gradients(const NormBackward& call, const float* weight, int64_t r, int64_t next, Means means,
                            float* factors) {
  using Element = typename Format::Element;
  const int64_t width = call.shape.width;
  const Row<Format> row(call, r), ahead(call, next);
  Element* const to_stream = static_cast<Element*>(call.grad_stream) + r * width;
  Element* const to_branch = DROPPED ? static_cast<Element*>(call.grad_branch) + r * width : nullptr;
  if constexpr (DROPPED) dropout_factors(call.dropout, r, width, factors);
  const float slope = means.gd * row.rstd * row.rstd * row.rstd;
  walk(width, [=](int64_t column, auto step, int) __attribute__((always_inline)) {
    fetch<NEAR>(ahead.grad_normalized + column);
    fetch<NEAR>(ahead.summed + column);
    const Pair g = load_pair<Format>(row.grad_normalized + column, step) * load_pair<Float32>(weight + column, step);
    const Pair deviation = load_pair<Format>(row.summed + column, step) - row.mean;
    // Not g · rstd - (a constant): this difference is 0 where it ought to be, as in a row of one column.
    Pair gradient = (g - means.g) * row.rstd - deviation * slope;
    if constexpr (MORE) {
      fetch<NEAR>(ahead.grad_summed + column);
      gradient = gradient + load_pair<Format>(row.grad_summed + column, step);
    }
    store_pair<Format, STORES>(to_stream + column, gradient, step);
    if constexpr (DROPPED) {
      const Pair kept = load_in_order<Float32>(factors + column, step);
      store_pair<Format, STORES>(to_branch + column, gradient * to_pair_order<Format, decltype(step)>(kept, step),
                                 step);
    }
  });
}

// The passes that a call is made of, chosen once.
struct Passes {
  using AddWeightGradients = void(const NormBackward&, const float*, const WeightGradients&, int64_t, Means*);
  using InputGradients = void(const NormBackward&, const float*, int64_t, int64_t, Means, float*);
  AddWeightGradients *of_one, *of_several;
  InputGradients* input_gradients;
};

template <class Format, bool MORE, bool DROPPED>
Passes::InputGradients* input_gradients_of(bool streamed) {
  return streamed ? input_gradients<Format, MORE, DROPPED, Stores::streamed>
                  : input_gradients<Format, MORE, DROPPED, Stores::cached>;
}

template <class Format>
Passes passes_of(const NormBackward& call, bool streamed) {
  const bool more = call.grad_summed.data, dropped = call.grad_branch;
  auto* input = more      ? dropped ? input_gradients_of<Format, true, true>(streamed)
                                    : input_gradients_of<Format, true, false>(streamed)
                : dropped ? input_gradients_of<Format, false, true>(streamed)
                          : input_gradients_of<Format, false, false>(streamed);
  if (call.shape.centered)
    return {add_weight_gradients<Format, true, 1>, add_weight_gradients<Format, true, ROWS_AT_ONCE>, input};
  return {add_weight_gradients<Format, false, 1>, add_weight_gradients<Format, false, ROWS_AT_ONCE>, input};
}

// Rows begin … end - 1: the gradients of their elements, and their share of the weights'. Rows up to stop - 1 are
// fetched ahead: those of the next chunk, if it is the same thread's.
void backward_of_chunk(const NormBackward& call, const Passes& passes, const float* weight, const WeightGradients& sums,
                       int64_t begin, int64_t end, int64_t stop) {
  const RowScratch scratch(call.shape.width, 1);
  for (int64_t i = 0; i < call.shape.width; i++) sums.weight[i] = sums.bias[i] = 0.0f;
  for (int64_t r = begin; r < end;) {
    const bool several = r + ROWS_AT_ONCE <= end;
    Means means[ROWS_AT_ONCE];
    (several ? passes.of_several : passes.of_one)(call, weight, sums, r, means);
    for (int i = 0; i < (several ? ROWS_AT_ONCE : 1); i++, r++) {
      passes.input_gradients(call, weight, r, smaller(r + ROWS_AT_ONCE, stop - 1), means[i], scratch.rows[0]);
    }
  }
  finish_streaming();
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
CALLED void round_sums(const float* sums, void* to, int64_t begin, int64_t columns) {
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

template <class Format>
void backward(const NormBackward& call, const Threads& threads) {
  const NormShape& shape = call.shape;
  const int64_t width = shape.width, chunks = norm_chunks(shape), rows = norm_chunk_rows(shape);
  const int64_t at_once = norm_task_chunks(chunks, threads.count);
  const float* weight = widened<Format>(call.weight, shape.weight_dtype, width, 1.0f, call.workspace);
  float* partial = call.workspace + width;  // [chunks][2][width]
  const Results<Format> results(shape, call.grad_stream, call.grad_branch);
  const Passes passes = passes_of<Format>(call, results.are_streamed());
  deal(ceiling(chunks, at_once), threads, [&](int64_t task) {
    const int64_t last = smaller((task + 1) * at_once, chunks), stop = smaller(last * rows, shape.rows);
    for (int64_t chunk = task * at_once; chunk < last; chunk++) {
      const WeightGradients sums = {partial + 2 * chunk * width, partial + (2 * chunk + 1) * width};
      const int64_t begin = chunk * rows, end = smaller(begin + rows, shape.rows);
      results.prepare(begin, end);
      backward_of_chunk(call, passes, weight, sums, begin, end, stop);
    }
  });
  reduce_weight_gradients<Format>(call, partial, chunks, threads);
}

}  // namespace

void norm_backward(const NormBackward& call, const Threads& threads) {
  in_format(call.shape.dtype, [&](auto format) { backward<decltype(format)>(call, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
