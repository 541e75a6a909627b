// Layer norm and RMS norm, backward, on one instruction-set level; with a residual branch, dropped out or not.
//
// With d = summed - mean, u = d · rstd and g = grad_normalized · weight, over a row of width N:
//     grad_stream = (g - sum(g) / N - u · sum(g · u) / N) · rstd + grad_summed       sum(g) = 0 for an RMS norm
//     grad_branch = dropout(grad_stream)
//     grad_weight = sum over rows of grad_normalized · u,   grad_bias = sum over rows of grad_normalized
//
// A row is read from memory once: the second pass over it finds it in the cache. One loop takes the second pass along a
// row, the first along the row below it, and fetches the row below that one, so that memory never waits for
// arithmetic: the passes in turns, four rows and four rows, took 1.25 to 1.5 times as long in fp32, 1.0 to 1.4 times in
// bf16. Results that stay in the cache come from rows that do; fetching these again cost up to 1.2.
// Traffic an element: two reads and one write, one read more with grad_summed, one write more with dropout.
//
// A loop of the same reads, fetches and streamed writes that computes nothing takes 0.85 to 0.9 of the time in fp32 and
// 0.6 to 0.75 in bf16, two threads.
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

// Partial sums over the rows of a chunk, in pair order.
struct WeightGradients {
  float *weight, *bias;
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

// The first pass along ROWS rows, side by side: adds their share of the weights' gradients to a chunk's, and sums g and
// g · d up. Starts to fetch as many rows that follow.
template <class Format, bool MORE, Stores STORES, int ROWS>
struct FirstPass {
  Row<Format> rows[ROWS], ahead[ROWS];
  WeightGradients sums;

  FirstPass() = default;
  FirstPass(const NormBackward& call, int64_t r, int64_t end, const WeightGradients& sums) : sums(sums) {
    for (int i = 0; i < ROWS; i++) {
      rows[i] = Row<Format>(call, r + i);
      ahead[i] = Row<Format>(call, smaller(r + ROWS + i, end - 1));
    }
  }

  template <class Step>
  __attribute__((always_inline)) void take(int64_t column, Step step, Pair scale, Pair (&sums_g)[ROWS],
                                           Pair (&sums_gd)[ROWS]) const {
    Pair grad_weight = load_pair<Float32>(sums.weight + column, step);
    Pair grad_bias = load_pair<Float32>(sums.bias + column, step);
    for (int i = 0; i < ROWS; i++) {
      if constexpr (STORES == Stores::streamed) {
        fetch<NEAR>(ahead[i].grad_normalized + column);
        fetch<NEAR>(ahead[i].summed + column);
        if constexpr (MORE) fetch<NEAR>(ahead[i].grad_summed + column);
      }
      const Pair grad = load_pair<Format>(rows[i].grad_normalized + column, step);
      const Pair moment = grad * (load_pair<Format>(rows[i].summed + column, step) - rows[i].mean);
      sums_g[i] = sums_g[i] + grad * scale;
      sums_gd[i] = sums_gd[i] + moment * scale;
      grad_weight = grad_weight + moment * rows[i].rstd;
      grad_bias = grad_bias + grad;
    }
    store_pair<Float32>(sums.weight + column, grad_weight, step);
    store_pair<Float32>(sums.bias + column, grad_bias, step);
  }
};

Means means_of(const NormBackward& call, const Pair& sum_g, const Pair& sum_gd) {
  const float count = static_cast<float>(call.shape.width);
  Means means = {total(sum_g) / count, total(sum_gd) / count};
  if (!call.shape.centered) means.g = 0.0f;
  return means;
}

// The first pass along row r alone.
template <class Format>
CALLED Means first_pass(const NormBackward& call, const float* weight, const WeightGradients& sums, int64_t r) {
  const FirstPass<Format, false, Stores::cached, 1> pass(call, r, r + 1, sums);
  Pair sums_g[1] = {{Vector{}, Vector{}}}, sums_gd[1] = {{Vector{}, Vector{}}};
  walk(call.shape.width, [=, &sums_g, &sums_gd](int64_t column, auto step, int) __attribute__((always_inline)) {
    pass.take(column, step, load_pair<Float32>(weight + column, step), sums_g, sums_gd);
  });
  return means_of(call, sums_g[0], sums_gd[0]);
}

// The second pass along them, whose means are known: the gradients of their elements.
template <class Format, bool MORE, Stores STORES, int ROWS>
struct SecondPass {
  using Element = typename Format::Element;

  Row<Format> rows[ROWS];
  float mean_g[ROWS], slope[ROWS];
  Element *to_stream[ROWS], *to_branch[ROWS];
  const float* factors[ROWS];
  bool drops;

  SecondPass(const NormBackward& call, int64_t r, const Means* means, const RowScratch& scratch)
      : drops(call.grad_branch) {
    const int64_t width = call.shape.width;
    for (int i = 0; i < ROWS; i++) {
      rows[i] = Row<Format>(call, r + i);
      mean_g[i] = means[i].g;
      slope[i] = means[i].gd * rows[i].rstd * rows[i].rstd * rows[i].rstd;
      to_stream[i] = static_cast<Element*>(call.grad_stream) + (r + i) * width;
      if (!drops) continue;
      to_branch[i] = static_cast<Element*>(call.grad_branch) + (r + i) * width;
      dropout_factors(call.dropout, r + i, width, scratch.rows[i]);
      factors[i] = scratch.rows[i];
    }
  }

  template <class Step>
  __attribute__((always_inline)) void take(int64_t column, Step step, Pair scale) const {
    for (int i = 0; i < ROWS; i++) {
      const Pair g = load_pair<Format>(rows[i].grad_normalized + column, step) * scale;
      const Pair deviation = load_pair<Format>(rows[i].summed + column, step) - rows[i].mean;
      // Not g · rstd - (a constant): this difference is 0 where it ought to be, as in a row of one column.
      Pair gradient = (g - mean_g[i]) * rows[i].rstd - deviation * slope[i];
      if constexpr (MORE) gradient = gradient + load_pair<Format>(rows[i].grad_summed + column, step);
      store_pair<Format, STORES>(to_stream[i] + column, gradient, step);
      if (drops) {
        const Pair kept = load_in_order<Float32>(factors[i] + column, step);
        const Pair dropped = gradient * to_pair_order<Format, decltype(step)>(kept, step);
        store_pair<Format, STORES>(to_branch[i] + column, dropped, step);
      }
    }
  }
};

// Rows begin … end - 1, the first of which begins a chunk.
template <class Format, bool MORE, Stores STORES>
class Backward {
  const NormBackward& call;
  const float* const weight;
  float* const partial;  // [chunks][2][width]
  const int64_t begin, end, width, chunk_rows;
  const RowScratch scratch;  // dropout's factors

  // Of the chunk of row r, cleared where the row is its first.
  WeightGradients sums_of(int64_t r) const {
    float* const sums = partial + r / chunk_rows * 2 * width;
    if (r % chunk_rows == 0) clear(sums, 2 * width);
    return {sums, sums + width};
  }

  // The second pass along rows r - ROWS, …, and, with FIRST, the first along as many below them.
  template <int ROWS, bool FIRST>
  CALLED void pass(int64_t r, const Means* above, Means* means) const {
    const SecondPass<Format, MORE, STORES, ROWS> second(call, r - ROWS, above, scratch);
    FirstPass<Format, MORE, STORES, ROWS> first;
    Pair sums_g[ROWS], sums_gd[ROWS];
    if constexpr (FIRST) first = {call, r, end, sums_of(r)};
    for (int i = 0; i < ROWS; i++) sums_g[i] = sums_gd[i] = {Vector{}, Vector{}};  // not {}: see norm_forward.cpp
    walk(width, [=, weight = weight, &sums_g, &sums_gd](int64_t column, auto step, int) __attribute__((always_inline)) {
      const Pair scale = load_pair<Float32>(weight + column, step);  // 0 past the row's end
      if constexpr (FIRST) first.take(column, step, scale, sums_g, sums_gd);
      second.take(column, step, scale);
    });
    if constexpr (FIRST) {
      for (int i = 0; i < ROWS; i++) means[i] = means_of(call, sums_g[i], sums_gd[i]);
    }
  }

  // Rows r … stop - 1, ROWS side by side.
  template <int ROWS>
  void run(int64_t r, int64_t stop) const {
    if (r == stop) return;
    Means means[2][ROWS];
    int now = 0;
    for (int i = 0; i < ROWS; i++, r++) means[now][i] = first_pass<Format>(call, weight, sums_of(r), r);
    for (; r < stop; r += ROWS, now = 1 - now) pass<ROWS, true>(r, means[now], means[1 - now]);
    for (int i = 0; i < ROWS; i++) pass<1, false>(stop - ROWS + i + 1, &means[now][i], nullptr);
  }

 public:
  Backward(const NormBackward& call, const float* weight, float* partial, int64_t begin, int64_t end)
      : call(call),
        weight(weight),
        partial(partial),
        begin(begin),
        end(end),
        width(call.shape.width),
        chunk_rows(norm_chunk_rows(call.shape)),
        scratch(width, call.grad_branch ? BACKWARD_ROWS<Format> : 0) {}

  void run() const {
    constexpr int ROWS = BACKWARD_ROWS<Format>;
    const int64_t together = ROWS > 1 && width >= NORM_WIDE_ROW ? (end - begin) / ROWS * ROWS : 0;
    if constexpr (ROWS > 1) run<ROWS>(begin, begin + together);
    run<1>(begin + together, end);
    if constexpr (STORES == Stores::streamed) finish_streaming();
  }
};

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
  if (shape.rows == 0) clear(partial, 2 * width);
  const Results<Format> results(shape, call.grad_stream, call.grad_branch);
  const auto run = [&](int64_t begin, int64_t end, auto stores) {
    if (call.grad_summed.data) {
      Backward<Format, true, stores()>(call, weight, partial, begin, end).run();
    } else {
      Backward<Format, false, stores()>(call, weight, partial, begin, end).run();
    }
  };
  deal(ceiling(chunks, at_once), threads, [&](int64_t task) {
    const int64_t begin = task * at_once * rows, end = smaller(begin + at_once * rows, shape.rows);
    results.prepare(begin, end);
    if (results.are_streamed()) {
      run(begin, end, std::integral_constant<Stores, Stores::streamed>{});
    } else {
      run(begin, end, std::integral_constant<Stores, Stores::cached>{});
    }
  });
  reduce_weight_gradients<Format>(call, partial, chunks, threads);
}

}  // namespace

void norm_backward(const NormBackward& call, const Threads& threads) {
  in_format(call.shape.dtype, [&](auto format) { backward<decltype(format)>(call, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
