// One row, or a few, times a matrix of weights, on one instruction-set level: what a layer computes for each token that
// is generated.
//
//     output[m][n] = scales[n] · sum over k of input[m][k] · weight[n][k] + bias[n]        scales only with int8
//     weights
//
// Traffic: every weight once, and nothing else of that size; N · K · 4, 2 or 1 bytes. Operations: 2 · M · N · K, so
// that up to 8 rows wait for memory, not for the multiply-adds. What counts is how memory is read: one stream of
// addresses a thread leaves a third of the bandwidth unused, STREAMS at once do not. A task therefore has STREAMS runs
// of adjacent rows, and walks along all of them together.
//
// The sum of an output follows one order that depends on K alone: chunk by chunk, in each the lanes, then across them.
// Which rows share a task, and who computes it, changes nothing.
#include "level.h"
#include "pair.h"
#include "queue.h"

namespace trilby::TRILBY_LEVEL {

namespace {

constexpr int STREAMS = 8;
// The longest run, in bytes: the prefetchers, which stop at the end of each page, want something to run along. Measured
// on one thread, in percent of a plain read by eight streams, fp32 and int8 at N = 50,257, K = 768: 80 and 58 with 4
// KiB, 87 and 74 with 16, 87 and 80 with 64.
constexpr int64_t STREAM_BYTES = 65536;
// Tasks for each thread, that they end together: worth more than long runs, but not than waking a thread for a run
// shorter than SHORTEST_STREAM_BYTES; all eight of those take it 5 µs.
constexpr int64_t TASKS_PER_THREAD = 4;
constexpr int64_t SHORTEST_STREAM_BYTES = 8192;
// Rows of input that are multiplied with a weight once it is in a register; more take turns while the task's weights
// are in the second-level cache.
constexpr int MOST_ROWS = 8;
// Sums at once in registers, of which AVX-512 has 32 and the others 16: pairs of weights and of input take the rest.
constexpr int MOST_SUMS = LANES == 16 ? 20 : 8;
// Columns that are summed on their own before they are added to the rest: a sum of sums is the more exact, and all
// streams advance by a chunk before the first goes on.
constexpr int64_t CHUNK = 512;

// How far ahead of the weights in use the next ones are asked for, in bytes. Measured as above, fp32, bf16 and int8:
// 89, 79 and 73 percent without, 90, 89 and 80 with 512 bytes, 87, 85 and 74 with 1024, 82, 84 and 71 with 2048.
constexpr int64_t AHEAD = 512;

// int8 numbers as they lie in memory.
struct Int8 {
  using Element = int8_t;
};

static inline Vector load_floats(const int8_t* from) { return __builtin_convertvector(widened(from), Vector); }

// PAIR weights, or the fewer left at the end of a row, in the order of `Format`'s pairs.
template <class Format>
static inline Pair load_weights(const typename Format::Element* from, Whole step) {
  if constexpr (sizeof(typename Format::Element) == 1) {
    return {load_floats(from), load_floats(from + LANES)};
  } else {
    return load_pair<Format>(from, step);
  }
}
template <class Format>
static inline Pair load_weights(const typename Format::Element* from, Rest rest) {
  if constexpr (sizeof(typename Format::Element) == 1) {
    int8_t some[PAIR] = {};
    for (int64_t i = 0; i < rest.count; i++) some[i] = from[i];
    return load_weights<Format>(some, Whole{});
  } else {
    return load_pair<Format>(from, rest);
  }
}

template <class Format>
static inline float element(const typename Format::Element* from) {
  return load_some<Format>(from, 1)[0];
}

// The rows of input as floats, each `width` (a multiple of PAIR) long and 0 past K, in the order of the weights' pairs.
struct Inputs {
  const float* data;
  int64_t width;
};

template <class Format, class Weights>
Inputs load_inputs(const Linear& problem) {
  const int64_t width = ceiling(problem.inputs, PAIR) * PAIR;
  float* to = static_cast<float*>(thread_scratch(static_cast<size_t>(problem.rows * width) * sizeof(float)));
  for (int64_t m = 0; m < problem.rows; m++) {
    const auto* row = static_cast<const typename Format::Element*>(problem.input) + m * problem.input_row;
    unpack_in_pair_order<Format, Weights>(row, problem.input_column, problem.inputs, to + m * width);
  }
  return {to, width};
}

// Adds the products of one step of R streams and M rows of input to `sums`. The fewer of the two stay in registers.
template <class Weights, int R, int M, class Step>
static inline void step_along(const typename Weights::Element* const* streams, const Inputs& inputs, int64_t column,
                              Step step, Vector (&sums)[R][M]) {
  const auto input = [&](int m) __attribute__((always_inline)) {
    const float* at = inputs.data + m * inputs.width + column;
    return Pair{load(at), load(at + LANES)};
  };
  const auto weights = [&](int r) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const char*>(streams[r] + column) + AHEAD);
    return load_weights<Weights>(streams[r] + column, step);
  };
  const auto add = [&](int r, int m, Pair a, Pair b) __attribute__((always_inline)) {
    sums[r][m] += a.first * b.first;
    sums[r][m] += a.second * b.second;
  };
  if constexpr (R > M) {
    Pair kept[M];
    for (int m = 0; m < M; m++) kept[m] = input(m);
    for (int r = 0; r < R; r++) {
      const Pair once = weights(r);
      for (int m = 0; m < M; m++) add(r, m, once, kept[m]);
    }
  } else {
    Pair kept[R];
    for (int r = 0; r < R; r++) kept[r] = weights(r);
    for (int m = 0; m < M; m++) {
      const Pair once = input(m);
      for (int r = 0; r < R; r++) add(r, m, kept[r], once);
    }
  }
}

// Adds the columns from `first` to `end`, at most CHUNK, of R streams to `totals`.
template <class Weights, int R, int M>
static void add_chunk(const typename Weights::Element* const* streams, const Inputs& inputs, int64_t first, int64_t end,
                      Vector (*totals)[M]) {
  Vector sums[R][M] = {};
  int64_t column = first;
  for (; column + PAIR <= end; column += PAIR) step_along<Weights, R, M>(streams, inputs, column, Whole{}, sums);
  if (column < end) step_along<Weights, R, M>(streams, inputs, column, Rest{end - column}, sums);
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) totals[r][m] += sums[r][m];
  }
}

// The sums of all lanes. Like `finish` it is called: inlined wherever weights of another kind are multiplied, both were
// a third of what the compiler had to do.
template <int M>
__attribute__((noinline)) void add_lanes(const Vector (&totals)[STREAMS][M], float* sums) {
  for (int i = 0; i < STREAMS * M; i += LANES) {
    Vector some[LANES] = {};
    for (int j = 0; j < LANES && i + j < STREAMS * M; j++) some[j] = totals[(i + j) / M][(i + j) % M];
    store(sums + i, horizontal_sums(some));
  }
}

// Turns `sums` [STREAMS][M] into outputs: weight row rows[s] times M rows of input.
template <class Format>
__attribute__((noinline)) void finish(const Linear& problem, const int64_t (&rows)[STREAMS], int64_t first_input,
                                      int64_t M, float* sums) {
  using Element = typename Format::Element;
  for (int s = 0; s < STREAMS; s++) {
    const float scale = problem.scales ? problem.scales[rows[s]] : 1.0f;
    const float bias = problem.bias ? element<Format>(static_cast<const Element*>(problem.bias) + rows[s]) : 0.0f;
    for (int64_t m = 0; m < M; m++) sums[s * M + m] = sums[s * M + m] * scale + bias;
  }
  Element outputs[STREAMS * MOST_ROWS];
  for (int64_t i = 0; i < STREAMS * M; i += LANES) Format::store_vector(outputs + i, load(sums + i));
  for (int s = 0; s < STREAMS; s++) {
    Element* to = static_cast<Element*>(problem.output) + first_input * problem.outputs + rows[s];
    for (int64_t m = 0; m < M; m++) to[m * problem.outputs] = outputs[s * M + m];
  }
}

constexpr int streams_in_registers(int M) {
  int R = STREAMS;
  while (R > 1 && R * M > MOST_SUMS) R /= 2;
  return R;
}

// The outputs of one row of weights from each stream, for M rows of input; stream s is at row rows[s].
template <class Format, class Weights, int M>
void multiply(const Linear& problem, const Inputs& inputs, int64_t first_input, const int64_t (&rows)[STREAMS]) {
  constexpr int R = streams_in_registers(M);
  const typename Weights::Element* streams[STREAMS];
  for (int s = 0; s < STREAMS; s++) {
    streams[s] = static_cast<const typename Weights::Element*>(problem.weight) + rows[s] * problem.weight_row;
  }
  const Inputs mine = {inputs.data + first_input * inputs.width, inputs.width};
  Vector totals[STREAMS][M] = {};
  for (int64_t column = 0; column < problem.inputs; column += CHUNK) {
    const int64_t end = smaller(column + CHUNK, problem.inputs);
    for (int s = 0; s < STREAMS; s += R) add_chunk<Weights, R, M>(streams + s, mine, column, end, totals + s);
  }
  float sums[STREAMS * M + LANES];
  add_lanes(totals, sums);
  finish<Format>(problem, rows, first_input, M, sums);
}

template <class Format, class Weights>
void multiply_rows(const Linear& problem, const Inputs& inputs, const int64_t (&rows)[STREAMS], int64_t first_input,
                   int64_t count) {
  switch (count) {
    case 1: return multiply<Format, Weights, 1>(problem, inputs, first_input, rows);
    case 2: return multiply<Format, Weights, 2>(problem, inputs, first_input, rows);
    case 3: return multiply<Format, Weights, 3>(problem, inputs, first_input, rows);
    case 4: return multiply<Format, Weights, 4>(problem, inputs, first_input, rows);
    case 5: return multiply<Format, Weights, 5>(problem, inputs, first_input, rows);
    case 6: return multiply<Format, Weights, 6>(problem, inputs, first_input, rows);
    case 7: return multiply<Format, Weights, 7>(problem, inputs, first_input, rows);
    default: return multiply<Format, Weights, MOST_ROWS>(problem, inputs, first_input, rows);
  }
}

int64_t rows_in_stream(const Linear& problem, size_t weight_bytes, int64_t threads) {
  const int64_t row_bytes = problem.inputs * static_cast<int64_t>(weight_bytes) + 1;
  const int64_t longest = STREAM_BYTES / row_bytes + 1, shortest = SHORTEST_STREAM_BYTES / row_bytes + 1;
  const int64_t even = ceiling(problem.outputs, STREAMS * TASKS_PER_THREAD * threads);
  return even < shortest ? shortest : smaller(even, longest);
}

template <class Format, class Weights>
void linear_of(const Linear& problem, const Threads& threads) {
  const Inputs inputs = load_inputs<Format, Weights>(problem);
  const int64_t length = rows_in_stream(problem, sizeof(typename Weights::Element), threads.count);
  deal(ceiling(problem.outputs, STREAMS * length), threads, [&](int64_t task) {
    const int64_t first = task * STREAMS * length;
    const int64_t count = smaller(problem.outputs - first, STREAMS * length), run = ceiling(count, STREAMS);
    for (int64_t m = 0; m < problem.rows; m += MOST_ROWS) {
      for (int64_t i = 0; i < run; i++) {
        // Past the end the last row is computed again, by the same thread: that is cheaper than a narrower loop.
        int64_t rows[STREAMS];
        for (int s = 0; s < STREAMS; s++) rows[s] = first + smaller(s * run + i, count - 1);
        multiply_rows<Format, Weights>(problem, inputs, rows, m, smaller(problem.rows - m, MOST_ROWS));
      }
    }
  });
}

template <class Format>
void linear_in(const Linear& problem, const Threads& threads) {
  return problem.scales ? linear_of<Format, Int8>(problem, threads) : linear_of<Format, Format>(problem, threads);
}

}  // namespace

void linear(const Linear& problem, const Threads& threads) {
  in_format(problem.dtype, [&](auto format) { linear_in<decltype(format)>(problem, threads); });
}

}  // namespace trilby::TRILBY_LEVEL
