// The one matrix product that attention is made of, forward and backward: a register tile of R x C vectors.
//
// out[r][c] (+)= sum over k of a[r][k] · b[k][c], with a read one element at a time (broadcast to all lanes, so any
// stride will do and K and V need no transposition) and b and out as vectors. Each step of k costs C vector loads and R
// broadcasts for R · C multiply-adds.
#pragma once

#include "vector.h"

namespace trilby::TRILBY_LEVEL {

// Rows of the register tile. AVX-512 has 32 registers: 24 accumulators of four vectors (5 rows measured 0.95 of this
// speed, and 7, which spill, 0.85) or of three, 16 of two, more of which measured the same, and of one 8, as many
// chains as hide the latency. The others have 16: 12 of two.
constexpr int rows_beside(int vectors) { return LANES == 16 && vectors <= 3 ? 8 : 6; }

// A float matrix; strides count elements.
struct Operand {
  const float* data;
  int64_t row, step;  // from one row r to the next, from one k to the next
};

// What the product is added to. It is summed on its own first: a long sum made of short ones is the more exact (a chain
// through all of 700 queries had 9 times the error of PyTorch's).
enum class Start {
  zero,     // out = a · b
  resume,   // out = out + a · b
  rescale,  // out = out · factor + a · b, with one factor for each column
};

// Which steps which vectors of columns take part in: all in all; vector c, ascending, in the first ends[c]; or column c
// in step k where seen[k][c], laid out as b, is not 0. What takes no part is not touched, not even by 0 · NaN.
struct AllSteps {
  int64_t steps;
};
struct RisingSteps {
  const int64_t* ends;
};
struct SeenSteps {
  int64_t steps;
  const float* seen;
};

// Steps k … end - 1 of the vectors from FIRST on.
template <int FIRST, int R, int C, class Seen>
__attribute__((always_inline)) static inline void add_steps(Operand a, const float* b, int64_t b_step, int64_t k,
                                                            int64_t end, Vector (&sum)[R][C], const Seen& seen) {
  for (; k < end; k++) {
    Vector columns[C];
    for (int c = FIRST; c < C; c++) columns[c] = load(b + k * b_step + c * LANES);
    for (int r = 0; r < R; r++) {
      const Vector element = broadcast(a.data[r * a.row + k * a.step]);
      for (int c = FIRST; c < C; c++) sum[r][c] = seen(k, c, sum[r][c] + element * columns[c], sum[r][c]);
    }
  }
}

constexpr auto SEE_ALL = [](int64_t, int, Vector added, Vector) __attribute__((always_inline)) { return added; };

template <int R, int C>
__attribute__((always_inline)) static inline void add_all_steps(Operand a, const float* b, int64_t b_step, AllSteps all,
                                                                Vector (&sum)[R][C]) {
  add_steps<0>(a, b, b_step, 0, all.steps, sum, SEE_ALL);
}

template <int R, int C>
__attribute__((always_inline)) static inline void add_all_steps(Operand a, const float* b, int64_t b_step,
                                                                RisingSteps rising, Vector (&sum)[R][C]) {
  static_assert(C <= 4);
  add_steps<0>(a, b, b_step, 0, rising.ends[0], sum, SEE_ALL);
  if constexpr (C > 1) add_steps<1>(a, b, b_step, rising.ends[0], rising.ends[1], sum, SEE_ALL);
  if constexpr (C > 2) add_steps<2>(a, b, b_step, rising.ends[1], rising.ends[2], sum, SEE_ALL);
  if constexpr (C > 3) add_steps<3>(a, b, b_step, rising.ends[2], rising.ends[3], sum, SEE_ALL);
}

template <int R, int C>
__attribute__((always_inline)) static inline void add_all_steps(Operand a, const float* b, int64_t b_step,
                                                                SeenSteps some, Vector (&sum)[R][C]) {
  const auto see = [&](int64_t k, int c, Vector added, Vector old) __attribute__((always_inline)) {
    return load(some.seen + k * b_step + c * LANES) != 0.0f ? added : old;
  };
  add_steps<0>(a, b, b_step, 0, some.steps, sum, see);
}

// Inlined wherever it is used, so that the compiler knows which of an operand's strides is 1: as a function,
// attention's forward was 0.9 times as fast.
template <int R, int C, Start START, class Steps>
__attribute__((always_inline)) static inline void product_tile(Operand a, const float* b, int64_t b_step, float* out,
                                                               int64_t out_row, const float* factor, Steps steps) {
  Vector sum[R][C] = {};
  add_all_steps(a, b, b_step, steps, sum);
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) {
      float* at = out + r * out_row + c * LANES;
      if constexpr (START == Start::zero) store(at, sum[r][c]);
      if constexpr (START == Start::resume) store(at, load(at) + sum[r][c]);
      if constexpr (START == Start::rescale) store(at, load(at) * load(factor + c * LANES) + sum[r][c]);
    }
  }
}

// C vectors of columns, any number of rows: tiles of rows_beside(C), then of the powers of two below.
template <int C, Start START, int R = rows_beside(C), class Steps>
__attribute__((always_inline)) static inline void product(int64_t rows, Operand a, const float* b, int64_t b_step,
                                                          float* out, int64_t out_row, const float* factor,
                                                          Steps steps) {
  for (; rows >= R; rows -= R) {
    product_tile<R, C, START>(a, b, b_step, out, out_row, factor, steps);
    a.data += R * a.row;
    out += R * out_row;
  }
  if constexpr (R > 1) {
    constexpr int SMALLER = R > 4 ? 4 : R / 2;
    if (rows > 0) product<C, START, SMALLER>(rows, a, b, b_step, out, out_row, factor, steps);
  }
}

}  // namespace trilby::TRILBY_LEVEL
