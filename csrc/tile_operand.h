// What is multiplied in bf16, on the tile unit (tile_product.h) or by vectors (dot_product.h).
#pragma once

#include <cstdint>

namespace trilby::TRILBY_LEVEL {

constexpr int64_t TILE_ROWS = 16;     // also columns of 4 bytes
constexpr int64_t TILE_NUMBERS = 32;  // bf16 numbers of a row

// Rows of bf16 numbers; as the right operand each row holds pairs: those of the steps 2k and 2k + 1, column by column.
// Rows and columns fill whole tiles. `row` counts numbers.
struct TileOperand {
  const uint16_t* data;
  int64_t row;
};

}  // namespace trilby::TRILBY_LEVEL
