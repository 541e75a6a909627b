// The one matrix product that attention is made of, forward and backward: a register tile of R x C vectors.
//
// out[r][c] (+)= sum over k of a[r][k] · b[k][c], with a read one element at a time (broadcast to all lanes, so any
// stride will do and K and V need no transposition) and b and out as vectors. Each step of k costs C vector loads and R
// broadcasts for R · C multiply-adds.
#pragma once

#include "vector.h"

namespace trilby::TRILBY_LEVEL {

// Rows of the register tile. AVX-512 has 32 registers: 24 accumulators of four vectors (5 rows measured 0.95 of this
// speed, and 7, which spill, 0.85), 16 of two, more of which measured the same. The others have 16: 12 of two.
constexpr int rows_beside(int vectors) { return LANES == 16 && vectors <= 2 ? 8 : 6; }

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

// MASKED: column c takes part in step k only where seen[k][c], laid out as b, is not 0, and is not touched elsewhere,
// not even by 0 · NaN.
// Inlined wherever it is used, so that the compiler knows which of an operand's strides is 1: as a function,
// attention's forward was 0.9 times as fast.
template <int R, int C, Start START, bool MASKED>
__attribute__((always_inline)) static inline void product_tile(Operand a, const float* b, int64_t b_step, float* out,
                                                               int64_t out_row, const float* factor, int64_t steps,
                                                               const float* seen) {
  Vector sum[R][C] = {};
  for (int64_t k = 0; k < steps; k++) {
    Vector columns[C];
    for (int c = 0; c < C; c++) columns[c] = load(b + k * b_step + c * LANES);
    for (int r = 0; r < R; r++) {
      const Vector element = broadcast(a.data[r * a.row + k * a.step]);
      for (int c = 0; c < C; c++) {
        const Vector added = sum[r][c] + element * columns[c];
        if constexpr (MASKED) {
          sum[r][c] = load(seen + k * b_step + c * LANES) != 0.0f ? added : sum[r][c];
        } else {
          sum[r][c] = added;
        }
      }
    }
  }
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
template <int C, Start START, bool MASKED = false, int R = rows_beside(C)>
__attribute__((always_inline)) static inline void product(int64_t rows, Operand a, const float* b, int64_t b_step,
                                                          float* out, int64_t out_row, const float* factor,
                                                          int64_t steps, const float* seen = nullptr) {
  for (; rows >= R; rows -= R) {
    product_tile<R, C, START, MASKED>(a, b, b_step, out, out_row, factor, steps, seen);
    a.data += R * a.row;
    out += R * out_row;
  }
  if constexpr (R > 1) {
    constexpr int SMALLER = R > 4 ? 4 : R / 2;
    if (rows > 0) product<C, START, MASKED, SMALLER>(rows, a, b, b_step, out, out_row, factor, steps, seen);
  }
}

}  // namespace trilby::TRILBY_LEVEL
