// What the forward and the backward of a norm share: walking along a row, finding it, and the weights as floats.
#pragma once

#include <type_traits>  // types, no code

#include "level.h"
#include "norm_plan.h"
#include "pair.h"
#include "queue.h"
#include "random.h"

namespace trilby::TRILBY_LEVEL {

// Chains of additions that run at once, each of a pair, to hide the latency of an addition.
constexpr int CHAINS = 2;

// A pass over a row is a function that is called: inlined wherever a row is passed over, it was compiled up to eight
// times, and the norms took as long to compile as everything else. A call takes a nanosecond.
#define CALLED __attribute__((noinline))

// Calls step(column, Whole or Rest, chain) along a row. Inlined always, and steps capture what they read by value: a
// pointer that is captured by reference is loaded again after every store, which took a third of all instructions.
template <int CHAINS = 1, class Step>
static inline __attribute__((always_inline)) void walk(int64_t width, const Step& step) {
  int64_t column = 0;
  if constexpr (CHAINS > 1) {
    for (; column + CHAINS * PAIR <= width; column += CHAINS * PAIR) {
      for (int chain = 0; chain < CHAINS; chain++) step(column + chain * PAIR, Whole{}, chain);
    }
  }
  for (; column + PAIR <= width; column += PAIR) step(column, Whole{}, 0);
  if (column < width) step(column, Rest{width - column}, 0);
}

template <int SIDE, int... LANE>
static inline Vector folded(Vector vector, std::integer_sequence<int, LANE...> lanes) {
  vector += __builtin_shufflevector(vector, vector, (LANE ^ SIDE)...);
  if constexpr (SIDE > 1) return folded<SIDE / 2>(vector, lanes);
  return vector;
}

static inline float total(const Pair sum) {
  return folded<LANES / 2>(sum.first + sum.second, std::make_integer_sequence<int, LANES>{})[0];
}

static CALLED int64_t offset_in_dimensions(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = rows.dimensions - 1; d >= 0; d--) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

// Where row `row` begins, in elements.
static inline int64_t row_offset(const Rows& rows, int64_t row) {
  return rows.dimensions == 1 ? row * rows.strides[0] : offset_in_dimensions(rows, row);
}

template <class Format>
static inline const typename Format::Element* row_at(const Rows& rows, int64_t row) {
  return static_cast<const typename Format::Element*>(rows.data) + row_offset(rows, row);
}

// Starts to fetch a step of a row that is read soon, into the first-level or the second-level cache.
constexpr int NEAREST = 3, NEAR = 2;
template <int CACHE, class Element>
static inline void fetch(const Element* from) {
  constexpr int LINE = 64 / sizeof(Element);
  for (int i = 0; i < PAIR; i += LINE) __builtin_prefetch(from + i, 0, CACHE);
}

// Results of this size and more are stored past the cache: a store that misses first reads the line it overwrites. On a
// Xeon that pays from 4 MiB on; on an EPYC, whose last cache is fast, storing as usual is 1.25 to 1.45 times as fast at
// 4 and 6 MiB, both take as long at 8 and 16, and usual stores 1.3 times as long at 24.
//
// Not so in new memory, where the system writes zeros first, to the cache. (8192, 1600) in fp32, forward, on a Xeon,
// times as fast as PyTorch: 0.73 when it is stored past the cache, 1.06 as usual, 1.22 with the pages of a whole task
// mapped at once before; 1.12 if they are by 256 KiB, in shorter tasks.
constexpr int64_t LARGE_BYTES = int64_t{LANES == 16 ? 4 : 8} << 20;

// The results of a call, of equal shapes, and how they are stored. `second` may be null.
template <class Format>
class Results {
  char *const first, *const second;
  const int64_t row_bytes;
  const bool large, is_new;

  bool begins_on_lines() const {  // of the cache, every row
    const auto addresses = reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second);
    return (addresses | static_cast<uintptr_t>(row_bytes)) % 64 == 0;
  }

 public:
  Results(const NormShape& shape, void* first, void* second)
      : first(static_cast<char*>(first)),
        second(static_cast<char*>(second)),
        row_bytes(shape.width * static_cast<int64_t>(sizeof(typename Format::Element))),
        large(shape.rows * row_bytes >= LARGE_BYTES),
        is_new(large && !has_pages(first, shape.rows * row_bytes)) {}

  bool are_streamed() const { return large && !is_new && begins_on_lines(); }

  // Before rows begin … end - 1 are stored.
  void prepare(int64_t begin, int64_t end) const {
    if (!is_new) return;
    for (char* tensor : {first, second}) {
      if (tensor) map_pages(tensor + begin * row_bytes, (end - begin) * row_bytes);
    }
  }
};

template <class Format, class WeightFormat>
static CALLED void widen(const void* weight, int64_t width, float* to) {
  const auto* from = static_cast<const typename WeightFormat::Element*>(weight);
  walk(width, [=](int64_t column, auto step, int) {
    const Pair pair = quieted(load_in_order<WeightFormat>(from + column, step));
    store_in_order<Float32>(to + column, to_pair_order<Format, decltype(step)>(pair, step), step);
  });
}

// A weight as floats in the pair order of `Format`, in `memory` unless it lies so already; `missing` if there is none.
template <class Format>
static CALLED const float* widened(const void* weight, Dtype dtype, int64_t width, float missing, float* memory) {
  if (!weight) {
    for (int64_t i = 0; i < width; i++) memory[i] = missing;
    return memory;
  }
  switch (dtype) {
    case Dtype::float32:
      if (!std::is_same_v<Format, BFloat16>) return static_cast<const float*>(weight);
      widen<Format, Float32>(weight, width, memory);
      break;
    case Dtype::bfloat16: widen<Format, BFloat16>(weight, width, memory); break;
    case Dtype::float16: widen<Format, Float16>(weight, width, memory); break;
  }
  return memory;
}

// What dropout multiplies each element of a row by, 0 or 1 / (1 - p), in memory order and in whole groups of columns.
static CALLED void dropout_factors(const Dropout& dropout, int64_t row, int64_t width, float* factors) {
  for (int64_t column = 0; column < width; column += RANDOM_GROUP) {
    uint32_t words[RANDOM_GROUP];
    random_words({dropout.seed, 0}, static_cast<uint64_t>(row), static_cast<uint32_t>(column / RANDOM_GROUP), words);
    for (int i = 0; i < RANDOM_GROUP; i++) factors[column + i] = words[i] >= dropout.threshold ? dropout.scale : 0.0f;
  }
}

// Wide rows that are computed side by side (NORM_WIDE_ROW). But no rows whose steps are less than a line: streamed in
// turns, bf16's halves of lines took twice as long on AVX2. AVX-512 and Arm have 32 registers, which four rows forward
// fill, and two backward.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int FORWARD_ROWS_AT_ONCE = 4;
#else
constexpr int FORWARD_ROWS_AT_ONCE = 2;
#endif

template <class Format>
constexpr bool HAS_WHOLE_LINES = PAIR * sizeof(typename Format::Element) >= 64 && !std::is_same_v<Format, Float16>;
template <class Format>
constexpr int FORWARD_ROWS = HAS_WHOLE_LINES<Format> ? FORWARD_ROWS_AT_ONCE : 1;
template <class Format>
constexpr int BACKWARD_ROWS = HAS_WHOLE_LINES<Format> ? NORM_BACKWARD_ROWS : 1;

// A thread's own memory: rows of floats, no two of which begin on the same set of a cache.
struct RowScratch {
  float* rows[1 + 2 * FORWARD_ROWS_AT_ONCE];

  RowScratch(int64_t width, int count) {
    const int64_t floats = ceiling(width, RANDOM_GROUP) * RANDOM_GROUP + 16;
    rows[0] = static_cast<float*>(thread_scratch(static_cast<size_t>(count * floats) * sizeof(float)));
    for (int i = 1; i < count; i++) rows[i] = rows[i - 1] + floats;
  }
};

}  // namespace trilby::TRILBY_LEVEL
