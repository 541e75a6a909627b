// What the forward and the backward of a norm share: walking along a row, and the weights as floats.
#pragma once

#include "level.h"
#include "norm_plan.h"
#include "queue.h"
#include "random.h"
#include "stream.h"
#include "vector.h"

namespace trilby::TRILBY_LEVEL {

// A step of a row: a whole register, or what is left at its end.
struct Whole {};
struct Rest {
  int64_t count;  // 1 <= count < LANES
};

template <class Format>
static inline Vector load_at(const typename Format::Element* from, Whole) {
  return Format::load_vector(from);
}
template <class Format>
static inline Vector load_at(const typename Format::Element* from, Rest rest) {
  return load_some<Format>(from, rest.count);
}

// Whether stores pass the cache by.
enum class Stores { cached, streamed };

template <class Format, Stores STORES = Stores::cached>
static inline void store_at(typename Format::Element* to, Vector vector, Whole) {
  if constexpr (STORES == Stores::streamed) {
    stream(to, in_memory(Format{}, vector));
  } else {
    Format::store_vector(to, vector);
  }
}
template <class Format, Stores STORES = Stores::cached>
static inline void store_at(typename Format::Element* to, Vector vector, Rest rest) {
  store_some<Format>(to, vector, rest.count);
}

// Chains of additions that run at once, to hide the latency of an addition.
constexpr int CHAINS = 4;

// Calls step(column, Whole or Rest, chain) along a row.
template <class Step>
static inline void walk(int64_t width, const Step& step) {
  int64_t column = 0;
  for (; column + CHAINS * LANES <= width; column += CHAINS * LANES) {
    for (int chain = 0; chain < CHAINS; chain++) step(column + chain * LANES, Whole{}, chain);
  }
  for (; column + LANES <= width; column += LANES) step(column, Whole{}, 0);
  if (column < width) step(column, Rest{width - column}, 0);
}

// What becomes of a value that is stored and loaded again.
static inline Vector rounded(Float32, Vector vector) { return vector; }
static inline Vector rounded(BFloat16, Vector vector) { return from_bfloat16(to_bfloat16(vector)); }
static inline Vector rounded(Float16, Vector vector) { return from_float16(to_float16(vector)); }

static inline float total(const Vector (&chains)[CHAINS]) {
  return horizontal_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// The lanes of a step that hold elements; the others must not enter a sum.
static inline Vector only_elements(Vector vector, Whole) { return vector; }
static inline Vector only_elements(Vector vector, Rest rest) {
  return lane_numbers() < static_cast<float>(rest.count) ? vector : Vector{};
}

// Where row `row` begins, in elements.
static inline int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.dimensions == 1) return row * rows.strides[0];
  int64_t offset = 0;
  for (int64_t d = rows.dimensions - 1; d >= 0; d--) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

template <class Format>
static inline const typename Format::Element* row_at(const Rows& rows, int64_t row) {
  return static_cast<const typename Format::Element*>(rows.data) + row_offset(rows, row);
}

// Streams only what is large, and only to rows that begin on a line of the cache.
template <class Format>
static inline Stores stores_for(const NormShape& shape, const void* first, const void* second) {
  const int64_t row_bytes = shape.width * static_cast<int64_t>(sizeof(typename Format::Element));
  const bool large = shape.rows * row_bytes >= NORM_STREAMED_BYTES;
  const auto misaligned = (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second) |
                           static_cast<uintptr_t>(row_bytes)) % 64;
  return large && !misaligned ? Stores::streamed : Stores::cached;
}

template <class Format>
static inline void to_floats(const void* from, int64_t count, float* to) {
  const auto* elements = static_cast<const typename Format::Element*>(from);
  walk(count, [&](int64_t i, auto step, int) { store_at<Float32>(to + i, load_at<Format>(elements + i, step), step); });
}

// A weight as floats: itself if it is, else converted into `memory`; `missing` everywhere if there is none.
static inline const float* weight_as_floats(const void* weight, Dtype dtype, int64_t width, float missing, float* memory) {
  if (!weight) {
    for (int64_t i = 0; i < width; i++) memory[i] = missing;
  } else if (dtype == Dtype::float32) {
    return static_cast<const float*>(weight);
  } else if (dtype == Dtype::bfloat16) {
    to_floats<BFloat16>(weight, width, memory);
  } else {
    to_floats<Float16>(weight, width, memory);
  }
  return memory;
}

// What dropout multiplies each element of a row by, 0 or 1 / (1 - p). `factors` holds whole groups of columns.
static inline void dropout_factors(const Dropout& dropout, int64_t row, int64_t width, float* factors) {
  for (int64_t column = 0; column < width; column += RANDOM_GROUP) {
    uint32_t words[RANDOM_GROUP];
    random_words({dropout.seed, 0}, static_cast<uint64_t>(row), static_cast<uint32_t>(column / RANDOM_GROUP), words);
    for (int i = 0; i < RANDOM_GROUP; i++) factors[column + i] = words[i] >= dropout.threshold ? dropout.scale : 0.0f;
  }
}

// A thread's own memory: a row of floats and one of dropout factors.
struct RowScratch {
  float *row, *factors;

  explicit RowScratch(int64_t width) {
    const int64_t floats = ceiling(width, RANDOM_GROUP) * RANDOM_GROUP;
    row = static_cast<float*>(thread_scratch(static_cast<size_t>(2 * floats) * sizeof(float)));
    factors = row + floats;
  }
};

}  // namespace trilby::TRILBY_LEVEL
