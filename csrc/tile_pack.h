// Between tensors of bf16 as they lie in memory, or blocks of floats, and the operands of what multiplies bf16.
// Whatever fills up a tile is 0.
#pragma once

#include "pack.h"
#include "queue.h"
#if defined(__AMX_BF16__)
#include "tile_product.h"
#else
#include "dot_product.h"
#endif

#include <immintrin.h>

namespace trilby::TRILBY_LEVEL {

typedef uint16_t Numbers __attribute__((vector_size(64)));  // a row of a tile
static_assert(LANES == TILE_ROWS);

static inline int64_t whole_tiles(int64_t rows) { return ceiling(rows, TILE_ROWS) * TILE_ROWS; }
static inline int64_t whole_steps(int64_t steps) { return ceiling(steps, TILE_NUMBERS) * TILE_NUMBERS; }

static inline Bits load_bits(const uint32_t* from) { return (Bits)load(reinterpret_cast<const float*>(from)); }
static inline void store_bits(uint32_t* to, Bits bits) { store(reinterpret_cast<float*>(to), (Vector)bits); }

// `rows` rows of `columns` numbers times `sign` (1, -1 or 0), `width` apart in `to`; zeros after each, up to `width`.
static inline void copy_numbers(const uint16_t* from, const View& view, int64_t rows, int64_t columns, float sign,
                                uint16_t* to, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* row = from + r * view.row;
    uint16_t* copy = to + r * width;
    int64_t d = 0;
    if (view.column == 1) {  // without a call: of 64 columns those were a tenth of the forward's time
      for (; d + TILE_NUMBERS <= columns; d += TILE_NUMBERS) {
        Numbers numbers;
        __builtin_memcpy(&numbers, row + d, sizeof numbers);
        __builtin_memcpy(copy + d, &numbers, sizeof numbers);
      }
    }
    for (; d < columns; d++) copy[d] = row[d * view.column];
    for (; d < width; d++) copy[d] = 0;
    for (d = 0; sign != 1.0f && d < width; d += LANES) {
      BFloat16::store_vector(copy + d, BFloat16::load_vector(copy + d) * sign);
    }
  }
}

static inline void clear_numbers(uint16_t* numbers, int64_t count) {
  __builtin_memset(numbers, 0, static_cast<size_t>(count) * 2);
}

// Whether none of `count` numbers, in whole rows of tiles, is a NaN or an infinity.
static inline bool all_finite(const uint16_t* numbers, int64_t count) {
  Numbers spoiled = {};
  for (int64_t i = 0; i < count; i += TILE_NUMBERS) {
    Numbers row;
    __builtin_memcpy(&row, numbers + i, sizeof row);
    spoiled |= (Numbers)((row & 0x7f80u) == 0x7f80u);
  }
  return !any((Integers)spoiled);
}

static inline Bits load_wide(const uint16_t* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return widened(halves);
}

// As a right operand whose steps are columns: to[k][m] = from[m][2k], from[m][2k + 1], for m < PANEL's `rows`.
static inline void pair_columns(TileOperand from, int64_t width, int64_t rows, uint16_t* to) {
  for (int64_t m = 0; m < rows; m += LANES) {
    for (int64_t d = 0; d < width; d += TILE_NUMBERS) {
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) {
        block[i] = load(reinterpret_cast<const float*>(from.data + (m + i) * from.row + d));
      }
      transpose(block);
      for (int i = 0; i < LANES; i++) store(reinterpret_cast<float*>(to + (d / 2 + i) * 2 * rows + 2 * m), block[i]);
    }
  }
}

// As a right operand whose steps are rows: to[k][d] = from[2k][d], from[2k + 1][d], for an even number of rows.
static inline void pair_rows(TileOperand from, int64_t width, int64_t rows, uint16_t* to) {
  for (int64_t m = 0; m < rows; m += 2) {
    for (int64_t d = 0; d < width; d += LANES) {
      const uint16_t* even = from.data + m * from.row + d;
      const Bits pairs = load_wide(even) | load_wide(even + from.row) << 16;
      __builtin_memcpy(to + m * width + 2 * d, &pairs, sizeof pairs);
    }
  }
}

// A row's numbers, with 0 for what is not finite where FINITE.
template <bool FINITE>
static inline Numbers load_numbers(const uint16_t* from) {
  Numbers row;
  __builtin_memcpy(&row, from, sizeof row);
  return FINITE ? ((row & 0x7f80u) == 0x7f80u ? Numbers{} : row) : row;
}

// Of each 128 bits of two rows the lower (HALF 0) or upper four columns, in pairs: one instruction.
template <int HALF, int... NUMBER>
static inline Vector pairs_of(Numbers even, Numbers odd, std::integer_sequence<int, NUMBER...>) {
  return (Vector)__builtin_shufflevector(even, odd, (NUMBER / 8 * 8 + HALF * 4 + NUMBER % 8 / 2 + NUMBER % 2 * 32)...);
}

// Half the columns of 32 rows and 32 columns: see pairs_of.
template <bool FINITE, int HALF>
static inline void transpose_half(const uint16_t* from, int64_t width, int64_t columns, uint16_t* to, int64_t steps) {
  Vector block[LANES];
  for (int i = 0; i < LANES; i++) {
    const uint16_t* even = from + 2 * i * width;
    block[i] = pairs_of<HALF>(load_numbers<FINITE>(even), load_numbers<FINITE>(even + width),
                              std::make_integer_sequence<int, TILE_NUMBERS>{});
  }
  transpose(block);
  for (int i = 0; i < LANES; i++) {
    const int64_t column = i / 4 * 8 + HALF * 4 + i % 4;
    if (column < columns) store(reinterpret_cast<float*>(to + column * steps), block[i]);
  }
}

// As a left operand: to[d][n] = from[n][d], `steps` numbers a row, for as many rows of `from`, in whole steps, and
// `columns` of its columns, in whole tiles.
template <bool FINITE>
static inline void transpose_numbers(const uint16_t* from, int64_t width, int64_t columns, int64_t rows, uint16_t* to,
                                     int64_t steps) {
  for (int64_t n = 0; n < rows; n += TILE_NUMBERS) {
    for (int64_t d = 0; d < columns; d += TILE_NUMBERS) {
      transpose_half<FINITE, 0>(from + n * width + d, width, columns - d, to + d * steps + n, steps);
      transpose_half<FINITE, 1>(from + n * width + d, width, columns - d, to + d * steps + n, steps);
    }
  }
}

// 32 floats as bf16, rounded to nearest even, in memory order: one instruction.
static inline Numbers narrowed(Vector first, Vector second) {
  return (Numbers)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

template <int... NUMBER>
static inline Numbers interleaved(Numbers numbers, std::integer_sequence<int, NUMBER...>) {
  return __builtin_shufflevector(numbers, numbers, (NUMBER / 2 + NUMBER % 2 * LANES)...);
}

// 16 pairs of bf16: two instructions.
static inline Numbers rounded_pairs(Vector even, Vector odd) {
  return interleaved(narrowed(even, odd), std::make_integer_sequence<int, TILE_NUMBERS>{});
}

static inline void store_pairs(uint16_t* to, Vector even, Vector odd) {
  const Numbers pairs = rounded_pairs(even, odd);
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

// to[m][d] = from[d][m] · factors[m] for m < rows, as pack.h's unpack_transposed, of whole steps of columns. These are
// paired before they are transposed: half as much is, and a panel's way out takes 0.7 of the time.
static inline void unpack_pairs(const float* from, int64_t width, const float* factors, int64_t rows, int64_t columns,
                                uint16_t* to, int64_t stride) {
  for (int64_t m = 0; m < rows; m += LANES) {
    const Vector factor = load(factors + m);
    for (int64_t d = 0; d < columns; d += TILE_NUMBERS) {
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) {
        const float* pair = from + (d + 2 * i) * width + m;
        block[i] = (Vector)rounded_pairs(load(pair) * factor, load(pair + width) * factor);
      }
      transpose(block);
      for (int i = 0; i < LANES && m + i < rows; i++) {
        __builtin_memcpy(to + (m + i) * stride + d, &block[i], sizeof block[i]);
      }
    }
  }
}

}  // namespace trilby::TRILBY_LEVEL
