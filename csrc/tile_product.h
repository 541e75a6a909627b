// The matrix product of attention on the tile unit: what product.h is to vectors of floats.
//
// out[r][c] (+)= sum over k of a[r][k] · b[k][c], of bf16 numbers, summed in float32. Tiles are multiplied two by two:
// for 32 rows, 32 columns and 32 steps 4 loads (8 cycles each, of two ports' 16) and 4 multiplications (16 cycles), so
// that loads take half the time that products do, and four sums hide each other's latency (52 cycles, by Intel's
// manual). Beyond that only the sums' way in and out: at the 16 and 8 cycles of a store and a load of a tile, three
// quarters of the multiplications' time where there are 64 steps, by the manual. Measured on an Emerald Rapids: 4 loads
// and 4 multiplications 63 cycles; blocks of 64 steps in the first-level cache 1.4 times the multiplications' time.
#pragma once

#include "product.h"
#include "tile.h"

namespace trilby::TRILBY_LEVEL {

template <int SUM, Start START>
static inline void begin_sum(float* out, int64_t out_row) {
  if constexpr (START == Start::zero) tile_zero<SUM>();
  if constexpr (START == Start::resume) tile_load<SUM>(out, out_row * 4);
}

// ROWS and COLUMNS tiles of each: one or two. The sums are tiles 0 to 3, a's 4 and 5, b's 6 and 7.
template <int ROWS, int COLUMNS, Start START>
static inline void tile_block(TileOperand a, TileOperand b, float* out, int64_t out_row, int64_t steps) {
  static_assert(START != Start::rescale);
  float *const right = out + TILE_ROWS, *const below = out + TILE_ROWS * out_row, *const last = below + TILE_ROWS;
  begin_sum<0, START>(out, out_row);
  if constexpr (COLUMNS == 2) begin_sum<1, START>(right, out_row);
  if constexpr (ROWS == 2) begin_sum<2, START>(below, out_row);
  if constexpr (ROWS == 2 && COLUMNS == 2) begin_sum<3, START>(last, out_row);
  for (int64_t k = 0; k < steps; k += TILE_NUMBERS) {
    const uint16_t *const left = a.data + k, *const pairs = b.data + k / 2 * b.row;
    tile_load<4>(left, a.row * 2);
    tile_load<6>(pairs, b.row * 2);
    tile_multiply<0, 4, 6>();
    if constexpr (COLUMNS == 2) {
      tile_load<7>(pairs + TILE_NUMBERS, b.row * 2);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (ROWS == 2) {
      tile_load<5>(left + TILE_ROWS * a.row, a.row * 2);
      tile_multiply<2, 5, 6>();
      if constexpr (COLUMNS == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(out, out_row * 4);
  if constexpr (COLUMNS == 2) tile_store<1>(right, out_row * 4);
  if constexpr (ROWS == 2) tile_store<2>(below, out_row * 4);
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_store<3>(last, out_row * 4);
}

template <int COLUMNS, Start START>
static inline void tile_column(int64_t rows, TileOperand a, TileOperand b, float* out, int64_t out_row, int64_t steps) {
  for (; rows > TILE_ROWS; rows -= 2 * TILE_ROWS) {
    tile_block<2, COLUMNS, START>(a, b, out, out_row, steps);
    a.data += 2 * TILE_ROWS * a.row;
    out += 2 * TILE_ROWS * out_row;
  }
  if (rows > 0) tile_block<1, COLUMNS, START>(a, b, out, out_row, steps);
}

// The same from 0, for 64 steps at most: b's tiles are 4 to 7 and stay, a's 2 and 3, so that 16 rows take two loads
// where tile_block takes four. Tiles are renamed: the next rows' sums wait for no others. At D = 64 the forward
// measured 1.01 to 1.03 times as fast on one core of an Emerald Rapids, T = 1024 and 4096; the backward 1.00 to 1.01.
template <int STEPS>
static inline void tile_short_column(int64_t rows, TileOperand a, TileOperand b, float* out, int64_t out_row) {
  static_assert(STEPS == 1 || STEPS == 2);
  const uint16_t* const second = b.data + TILE_ROWS * b.row;
  tile_load<4>(b.data, b.row * 2);
  tile_load<5>(b.data + TILE_NUMBERS, b.row * 2);
  if constexpr (STEPS == 2) {
    tile_load<6>(second, b.row * 2);
    tile_load<7>(second + TILE_NUMBERS, b.row * 2);
  }
  for (; rows > 0; rows -= TILE_ROWS) {
    tile_load<2>(a.data, a.row * 2);
    tile_zero<0>();
    tile_zero<1>();
    tile_multiply<0, 2, 4>();
    tile_multiply<1, 2, 5>();
    if constexpr (STEPS == 2) {
      tile_load<3>(a.data + TILE_NUMBERS, a.row * 2);
      tile_multiply<0, 3, 6>();
      tile_multiply<1, 3, 7>();
    }
    tile_store<0>(out, out_row * 4);
    tile_store<1>(out + TILE_ROWS, out_row * 4);
    a.data += TILE_ROWS * a.row;
    out += TILE_ROWS * out_row;
  }
}

// Any numbers of rows, columns and steps, of which the operands and `out` hold whole tiles.
template <Start START>
static inline void tile_product(int64_t rows, int64_t columns, TileOperand a, TileOperand b, float* out,
                                int64_t out_row, int64_t steps) {
  for (; columns > TILE_ROWS; columns -= 2 * TILE_ROWS) {
    if (START == Start::zero && steps <= TILE_NUMBERS) {
      tile_short_column<1>(rows, a, b, out, out_row);
    } else if (START == Start::zero && steps <= 2 * TILE_NUMBERS) {
      tile_short_column<2>(rows, a, b, out, out_row);
    } else {
      tile_column<2, START>(rows, a, b, out, out_row, steps);
    }
    b.data += 2 * TILE_NUMBERS;
    out += 2 * TILE_ROWS;
  }
  if (columns > 0) tile_column<1, START>(rows, a, b, out, out_row, steps);
}

}  // namespace trilby::TRILBY_LEVEL
