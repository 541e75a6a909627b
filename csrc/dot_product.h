// The matrix product of attention in bf16 by vectors (AVX512-BF16): what tile_product.h is to the tile unit.
//
// out[r][c] (+)= sum over k of a[r][k] · b[k][c], of bf16 numbers, summed in float32: two steps are one instruction for
// 16 columns, a's pair broadcast to all lanes. It is product.h's register tile, with twice the products in an
// instruction: of attention's forward and backward 1.5 to 1.9 times the speed, measured on a Zen 4, where 24 sums of 12
// rows and two vectors, 2 loads and 12 broadcasts, take the 24 cycles of their products, and T = 4096 runs at 80 % of
// these.
#pragma once

#include "product.h"
#include "tile_operand.h"

#include <immintrin.h>

namespace trilby::TRILBY_LEVEL {

// Vectors keep nothing between products.
struct TilesInUse {
  TilesInUse() {}
  static void keep_awake() {}
};

// R rows, C vectors of columns.
template <int R, int C, Start START>
__attribute__((always_inline)) static inline void dot_tile(TileOperand a, TileOperand b, float* out, int64_t out_row,
                                                           int64_t steps) {
  static_assert(START != Start::rescale);
  Vector sum[R][C] = {};
  for (int64_t k = 0; k < steps; k += 2) {
    __m512i columns[C];
    for (int c = 0; c < C; c++) columns[c] = _mm512_loadu_si512(b.data + k / 2 * b.row + c * TILE_NUMBERS);
    for (int r = 0; r < R; r++) {
      int32_t pair;
      __builtin_memcpy(&pair, a.data + r * a.row + k, sizeof pair);
      const __m512i pairs = _mm512_set1_epi32(pair);
      for (int c = 0; c < C; c++) {
        sum[r][c] = (Vector)_mm512_dpbf16_ps((__m512)sum[r][c], (__m512bh)pairs, (__m512bh)columns[c]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) {
      float* at = out + r * out_row + c * LANES;
      store(at, START == Start::zero ? sum[r][c] : load(at) + sum[r][c]);
    }
  }
}

template <int C, Start START, int R>
__attribute__((always_inline)) static inline void dot_column(int64_t rows, TileOperand a, TileOperand b, float* out,
                                                             int64_t out_row, int64_t steps) {
  for (; rows >= R; rows -= R) {
    dot_tile<R, C, START>(a, b, out, out_row, steps);
    a.data += R * a.row;
    out += R * out_row;
  }
  if constexpr (R > 1) {
    constexpr int SMALLER = R > 8 ? 8 : R > 4 ? 4 : R / 2;
    if (rows > 0) dot_column<C, START, SMALLER>(rows, a, b, out, out_row, steps);
  }
}

// Any numbers of rows and steps, and whole tiles of columns. Steps are even, or one more is 0.
template <Start START>
static inline void tile_product(int64_t rows, int64_t columns, TileOperand a, TileOperand b, float* out,
                                int64_t out_row, int64_t steps) {
  for (; columns > TILE_ROWS; columns -= 2 * TILE_ROWS) {
    dot_column<2, START, 12>(rows, a, b, out, out_row, steps);
    b.data += 2 * TILE_NUMBERS;
    out += 2 * TILE_ROWS;
  }
  if (columns > 0) dot_column<1, START, 16>(rows, a, b, out, out_row, steps);
}

}  // namespace trilby::TRILBY_LEVEL
