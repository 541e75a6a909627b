// What attention multiplies, forward and backward, in bf16, on the tile unit or by vectors of pairs: what
// attention_vectors.h is to vectors of floats.
//
// Queries, keys, values, and whatever else is multiplied stay bf16, and so do probabilities and their gradients,
// rounded as PyTorch's kernel does; scores and sums are float32. A left operand has its steps side by side, a right
// operand in pairs: Q is transposed as pairs once for each panel, V once for each block and PANELS panels.
// attention_tiles_forward.h and attention_tiles_backward.h say which products those are.
#pragma once

#include "attention_sight.h"
#include "tile_pack.h"

namespace trilby::TRILBY_LEVEL {

// Head dimensions below this leave so much of a tile's 32 steps empty that vectors multiply as fast: D / 2 cycles for
// 16 scores (two multiply-adds a cycle), and a tile 1 and its way out of 2. By the count of instructions, not measured.
// Vectors of pairs multiply no empty steps, but rows are copied with them.
constexpr int64_t LEAST_TILED_DIM = 8;

static inline bool multiplied_by_tiles(const AttentionShape& shape) {
  return shape.dtype == Dtype::bfloat16 && shape.head_dim >= LEAST_TILED_DIM && shape.value_dim >= LEAST_TILED_DIM;
}

// A block of key or value, as [count][D] and, where it is wanted, as [D][count]. There 0 stands for what is not finite:
// 0 · NaN is NaN, and what is hidden must not be felt. add_spoiled adds what it gives to those who see it.
struct TileRows {
  TileOperand rows, transposed;
  bool finite;

  TileRows part(int64_t skipped) const {
    return {{rows.data + skipped * rows.row, rows.row}, {transposed.data + skipped, transposed.row}, finite};
  }
};

// A panel's rows, times `sign`, `width` numbers of each: where they are, if there is nothing to change or fill up, else
// in `to`, [PANEL][width], with zeros after each row and after the last.
static inline TileOperand panel_rows(const uint16_t* from, const View& view, int64_t count, int64_t columns, float sign,
                                     uint16_t* to, int64_t width) {
  if (sign == 1.0f && count == PANEL && columns == width && view.column == 1) return {from, view.row};
  copy_numbers(from, view, count, columns, sign, to, width);
  clear_numbers(to + count * width, (PANEL - count) * width);
  return {to, width};
}

// `count` rows of key or value where they are, if tiles may be loaded from there: one after the other (a tile's rows at
// a large power of two would fall into few sets of the cache and evict one another), in whole lines, of whole steps,
// and none past the last, which would have to be 0. Else null.
static inline const uint16_t* rows_in_place(const View& view, const KeyRows& rows, int64_t head, int64_t count,
                                            int64_t columns) {
  const uint16_t* from = row_of<const uint16_t>(view, rows.batch, head, rows.row);
  const bool fits = rows.count == count && count % TILE_NUMBERS == 0 && columns % TILE_NUMBERS == 0;
  const bool lies = view.column == 1 && view.row == columns && reinterpret_cast<uintptr_t>(from) % 64 == 0;
  return fits && lies ? from : nullptr;
}

// `count` rows of key or value: where they are, or in `to`.
static inline TileRows load_tile_rows(const AttentionSequences& sequences, const Sequence& sequence, const View& view,
                                      int64_t head, const KeyRange& range, int64_t columns, uint16_t* to,
                                      uint16_t* transposed) {
  const int64_t width = whole_steps(columns), filled = whole_steps(range.count);
  const KeyRows all(sequences, sequence, range.first, range.count);
  const uint16_t* rows = rows_in_place(view, all, head, range.count, columns);
  if (!rows) {
    for (int64_t done = 0; done < range.count;) {
      const KeyRows some(sequences, sequence, range.first + done, range.count - done);
      copy_numbers(row_of<const uint16_t>(view, some.batch, head, some.row), view, some.count, columns, 1.0f,
                   to + done * width, width);
      done += some.count;
    }
    clear_numbers(to + range.count * width, (filled - range.count) * width);
    rows = to;
  }
  if (!transposed) return {{rows, width}, {rows, width}, true};
  const bool finite = all_finite(rows, range.count * width);
  if (finite) {
    transpose_numbers<false>(rows, width, whole_tiles(columns), filled, transposed, BLOCK);
  } else {
    transpose_numbers<true>(rows, width, whole_tiles(columns), filled, transposed, BLOCK);
  }
  return {{rows, width}, {transposed, BLOCK}, finite};
}

// out[d][m] += rows[n][d] · weights[n][m] where rows[n][d] is not finite and seen[n][m] is not 0.
static inline void add_spoiled(TileOperand rows, int64_t count, int64_t columns, const uint16_t* weight_pairs,
                               const float* seen, float* out) {
  for (int64_t n = 0; n < count; n++) {
    for (int64_t d = 0; d < columns; d++) {
      const uint32_t number = static_cast<uint32_t>(rows.data[n * rows.row + d]) << 16;
      if ((number & 0x7f800000u) != 0x7f800000u) continue;
      for (int64_t m = 0; m < PANEL; m += LANES) {
        Bits pairs;
        __builtin_memcpy(&pairs, weight_pairs + (n / 2 * PANEL + m) * 2, sizeof pairs);
        const Vector weights = (Vector)(n % 2 ? pairs & 0xffff0000u : pairs << 16);
        float* sums = out + d * PANEL + m;
        const Vector added = load(sums) + weights * (Vector)(Bits{} + number);
        store(sums, load(seen + n * PANEL + m) != 0.0f ? added : load(sums));
      }
    }
  }
}

// Zeros in the steps after `count` of a right operand whose steps are keys, up to a whole tile.
static inline void fill_pairs(int64_t count, uint16_t* pairs) {
  const int64_t filled = ceiling(count, 2) * 2;
  clear_numbers(pairs + filled * PANEL, (whole_steps(count) - filled) * PANEL);
}

// A panel's results [columns][PANEL], times `factors`, as rows.
template <class Format>
static inline void unpack_panel(const float* from, const float* factors, int64_t rows, int64_t columns, uint16_t* to,
                                int64_t stride) {
  if (columns % TILE_NUMBERS == 0) return unpack_pairs(from, PANEL, factors, rows, columns, to, stride);
  unpack_transposed<Format>(from, PANEL, factors, rows, columns, to, stride);
}

struct KeyBlock : KeyRange {
  TileRows keys, values;

  KeyBlock part(const KeyRange& range, const AttentionShape&) const {
    const int64_t skipped = range.first - first;
    return {range, keys.part(skipped), values.part(skipped)};
  }
};

// What a task holds while it multiplies. Nothing may throw meanwhile: its scratch memory is there before.
using UnitInUse = TilesInUse;

// Which of key and value are wanted transposed, too.
enum class Transposed { keys, values };

// The blocks of keys and values of one task.
template <Transposed WHICH>
class BlockLoader {
 public:
  void place(Carver& carver, const AttentionShape& shape) {
    keys_ = carver.take<uint16_t>(BLOCK * whole_steps(shape.head_dim));
    values_ = carver.take<uint16_t>(BLOCK * whole_steps(shape.value_dim));
    const int64_t columns = WHICH == Transposed::keys ? shape.head_dim : shape.value_dim;
    transposed_ = carver.take<uint16_t>(whole_tiles(columns) * BLOCK);
  }

  template <class Format, class Problem>
  KeyBlock load_block(const Problem& problem, const Sequence& sequence, int64_t head, int64_t first,
                      int64_t count) const {
    const AttentionSequences& sequences = problem.sequences;
    const KeyRange range = {first, count};
    return {range,
            load_tile_rows(sequences, sequence, problem.key, head, range, problem.shape.head_dim, keys_,
                           WHICH == Transposed::keys ? transposed_ : nullptr),
            load_tile_rows(sequences, sequence, problem.value, head, range, problem.shape.value_dim, values_,
                           WHICH == Transposed::values ? transposed_ : nullptr)};
  }

  // Without values.
  template <class Format, class Problem>
  KeyBlock load_keys(const Problem& problem, const Sequence& sequence, int64_t head, const KeyRange& range) const {
    return {range, load_tile_rows({}, sequence, problem.key, head, range, problem.shape.head_dim, keys_, nullptr), {}};
  }

 private:
  uint16_t *keys_, *values_, *transposed_;
};

}  // namespace trilby::TRILBY_LEVEL
