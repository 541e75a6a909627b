// Between tensors as they lie in memory (any dtype, any strides) and the packed floats that the products read.
#pragma once

#include "vector.h"

namespace trilby::TRILBY_LEVEL {

template <class Element>
static inline Element* row_of(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<Element*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

static inline int64_t whole_vectors(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// One row of `columns` elements, `stride` apart, as floats side by side.
template <class Format>
static inline void unpack_row(const typename Format::Element* from, int64_t stride, int64_t columns, float* to) {
  if (stride == 1) {
    int64_t d = 0;
    for (; d + LANES <= columns; d += LANES) store(to + d, Format::load_vector(from + d));
    if (d < columns) {
      const Vector rest = load_some<Format>(from + d, columns - d);
      for (int64_t i = d; i < columns; i++) to[i] = rest[i - d];
    }
  } else {
    for (int64_t d = 0; d < columns; d++) to[d] = load_some<Format>(from + d * stride, 1)[0];
  }
}

template <class Format>
static inline void copy_rows(const typename Format::Element* from, const View& view, int64_t rows, int64_t columns,
                             float* to) {
  for (int64_t r = 0; r < rows; r++) unpack_row<Format>(from + r * view.row, view.column, columns, to + r * columns);
}

// `rows` rows as floats, side by side. Contiguous float rows are used where they are; all others are copied to `to`,
// also float rows at a stride: rows at a large power of two fall into few sets of the cache and evict one another.
template <class Format>
static inline const float* packed_rows(const typename Format::Element* from, const View& view, int64_t rows,
                                       int64_t columns, float* to) {
  if constexpr (sizeof(typename Format::Element) == sizeof(float)) {
    if (view.row == columns && view.column == 1) return reinterpret_cast<const float*>(from);
  }
  copy_rows<Format>(from, view, rows, columns, to);
  return to;
}

// to[d][m] = from[m][d] · scale for m < rows, 0 for rows <= m < width (a multiple of LANES).
template <class Format>
static inline void pack_transposed(const typename Format::Element* from, const View& view, int64_t rows,
                                   int64_t columns, float scale, float* to, int64_t width) {
  int64_t m = 0;
  for (; m < rows; m += LANES) {
    for (int64_t d = 0; d < columns; d += LANES) {
      const int64_t count = columns - d < LANES ? columns - d : LANES;
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) {
        const typename Format::Element* row = from + (m + i) * view.row + d * view.column;
        if (m + i >= rows) {
          block[i] = Vector{};
        } else if (view.column == 1 && count == LANES) {
          block[i] = Format::load_vector(row) * scale;
        } else {
          float elements[LANES] = {};
          unpack_row<Format>(row, view.column, count, elements);
          block[i] = load(elements) * scale;
        }
      }
      transpose(block);
      for (int64_t i = 0; i < count; i++) store(to + (d + i) * width + m, block[i]);
    }
  }
  for (; m < width; m += LANES) {
    for (int64_t d = 0; d < columns; d++) store(to + d * width + m, Vector{});
  }
}

// to[m][d] = from[d][m] · factors[m] for m < rows, d < columns; rows of `to` lie `stride` apart, their elements side by
// side.
template <class Format>
static inline void unpack_transposed(const float* from, int64_t width, const float* factors, int64_t rows,
                                     int64_t columns, typename Format::Element* to, int64_t stride) {
  for (int64_t m = 0; m < rows; m += LANES) {
    const Vector factor = load(factors + m);
    for (int64_t d = 0; d < columns; d += LANES) {
      const int64_t count = columns - d < LANES ? columns - d : LANES;
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = i < count ? load(from + (d + i) * width + m) * factor : Vector{};
      transpose(block);
      for (int i = 0; i < LANES && m + i < rows; i++) {
        typename Format::Element* row = to + (m + i) * stride + d;
        if (count == LANES) {
          Format::store_vector(row, block[i]);
        } else {
          store_some<Format>(row, block[i], count);
        }
      }
    }
  }
}

// Zeros in the rows [first, end), whose elements lie side by side.
template <class Format>
static inline void clear_rows(const View& view, int64_t batch, int64_t head, int64_t first, int64_t end,
                              int64_t columns) {
  using Element = typename Format::Element;
  for (int64_t row = first; row < end; row++) {
    __builtin_memset(row_of<Element>(view, batch, head, row), 0, static_cast<size_t>(columns) * sizeof(Element));
  }
}

// Whether none of `count` floats is a NaN or an infinity: only those times 0 are not 0. Four chains hide the latency.
static inline bool all_finite(const float* values, int64_t count) {
  constexpr int CHAINS = 4;
  Vector spoiled[CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * LANES <= count; i += CHAINS * LANES) {
    for (int chain = 0; chain < CHAINS; chain++) spoiled[chain] += load(values + i + chain * LANES) * 0.0f;
  }
  float sum = horizontal_sum((spoiled[0] + spoiled[1]) + (spoiled[2] + spoiled[3]));
  for (; i < count; i++) sum += values[i] * 0.0f;
  return sum == 0.0f;
}

}  // namespace trilby::TRILBY_LEVEL
