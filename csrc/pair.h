// Two registers of floats at a time, in the order that suits the format of the elements they come from. One register of
// bf16 holds 2 · LANES elements: a shift makes floats of its even ones, a mask of its odd ones, and their way back
// needs no shuffle either. That is half the instructions of widening in memory order, on every level.
//
// A row of floats that goes with a row of elements (weights, sums of gradients, a row added up) therefore lies in "pair
// order": of every PAIR columns of bf16 first the even and then the odd ones. The columns left at the end of a row, and
// rows of other formats, are in memory order.
#pragma once

#include <type_traits>  // types, no code

#include "stream.h"
#include "vector.h"

namespace trilby::TRILBY_LEVEL {

constexpr int PAIR = 2 * LANES;  // columns

struct Pair {
  Vector first, second;
};

static inline Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
static inline Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
static inline Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
static inline Pair operator+(Pair a, float b) { return {a.first + b, a.second + b}; }
static inline Pair operator-(Pair a, float b) { return {a.first - b, a.second - b}; }
static inline Pair operator*(Pair a, float b) { return {a.first * b, a.second * b}; }

// A step along a row: PAIR columns, or the fewer that are left at its end.
struct Whole {};
struct Rest {
  int64_t count;  // 1 <= count < PAIR
};

static inline Pair only_columns(Pair pair, Whole) { return pair; }
static inline Pair only_columns(Pair pair, Rest rest) {
  const Vector lanes = lane_numbers();
  return {lanes < static_cast<float>(rest.count) ? pair.first : Vector{},
          lanes + static_cast<float>(LANES) < static_cast<float>(rest.count) ? pair.second : Vector{}};
}

// In memory order.
template <class Format>
static inline Pair load_in_order(const typename Format::Element* from, Whole) {
  return {Format::load_vector(from), Format::load_vector(from + LANES)};
}
template <class Format>
static inline Pair load_in_order(const typename Format::Element* from, Rest rest) {
  if (rest.count < LANES) return {load_some<Format>(from, rest.count), Vector{}};
  return {Format::load_vector(from),
          rest.count > LANES ? load_some<Format>(from + LANES, rest.count - LANES) : Vector{}};
}
template <class Format>
static inline void store_in_order(typename Format::Element* to, Pair pair, Whole) {
  Format::store_vector(to, pair.first);
  Format::store_vector(to + LANES, pair.second);
}
template <class Format>
static inline void store_in_order(typename Format::Element* to, Pair pair, Rest rest) {
  if (rest.count < LANES) return store_some<Format>(to, pair.first, rest.count);
  Format::store_vector(to, pair.first);
  if (rest.count > LANES) store_some<Format>(to + LANES, pair.second, rest.count - LANES);
}

template <int... LANE>
static inline Pair even_and_odd(Pair pair, std::integer_sequence<int, LANE...>) {
  return {__builtin_shufflevector(pair.first, pair.second, (2 * LANE)...),
          __builtin_shufflevector(pair.first, pair.second, (2 * LANE + 1)...)};
}
template <int... LANE>
static inline Pair interleaved(Pair pair, std::integer_sequence<int, LANE...>) {
  return {__builtin_shufflevector(pair.first, pair.second, (LANE / 2 + LANE % 2 * LANES)...),
          __builtin_shufflevector(pair.first, pair.second, (LANES / 2 + LANE / 2 + LANE % 2 * LANES)...)};
}

// From memory order to the pair order of a format, and back.
template <class Format, class Step>
static inline Pair to_pair_order(Pair pair, Step) {
  return pair;
}
template <class Format, class Step>
static inline Pair to_memory_order(Pair pair, Step) {
  return pair;
}
template <>
inline Pair to_pair_order<BFloat16, Whole>(Pair pair, Whole) {
  return even_and_odd(pair, std::make_integer_sequence<int, LANES>{});
}
template <>
inline Pair to_memory_order<BFloat16, Whole>(Pair pair, Whole) {
  return interleaved(pair, std::make_integer_sequence<int, LANES>{});
}

// In pair order.
template <class Format, class Step>
static inline Pair load_pair(const typename Format::Element* from, Step step) {
  return load_in_order<Format>(from, step);
}
template <>
inline Pair load_pair<BFloat16, Whole>(const uint16_t* from, Whole) {
  Bits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return {(Vector)(bits << 16), (Vector)(bits & 0xffff0000u)};
}

// `count` elements, `stride` apart, as floats in the pair order of Order, and zeros up to a whole number of pairs.
template <class Format, class Order>
static inline void unpack_in_pair_order(const typename Format::Element* from, int64_t stride, int64_t count,
                                        float* to) {
  const auto put = [&](const typename Format::Element* elements, int64_t column, auto step)
                       __attribute__((always_inline)) {
                         const Pair pair = to_pair_order<Order>(load_in_order<Format>(elements, step), step);
                         store(to + column, pair.first);
                         store(to + column + LANES, pair.second);
                       };
  for (int64_t column = 0; column < count; column += PAIR) {
    const int64_t here = count - column < PAIR ? count - column : PAIR;
    typename Format::Element some[PAIR];
    if (stride != 1) {
      for (int64_t i = 0; i < here; i++) some[i] = from[(column + i) * stride];
    }
    const typename Format::Element* elements = stride == 1 ? from + column : some;
    if (here == PAIR) {
      put(elements, column, Whole{});
    } else {
      put(elements, column, Rest{here});
    }
  }
}

// Rounded to nearest even in the high half of each lane. A NaN stays one if the low half of its bits is 0: rounding
// then carries nothing into the high half. Arithmetic on such NaNs and numbers makes no others, so that 2 of 6
// instructions are saved by `quieted` where other floats come in.
static inline Bits high_bfloat16(Vector vector) {
  const Bits bits = (Bits)vector;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

static inline Pair quieted(Pair pair) {
  const Vector nan = (Vector)(Bits{} + 0x7fc00000u);
  return {pair.first != pair.first ? nan : pair.first, pair.second != pair.second ? nan : pair.second};
}

// The same by the adder, in 2 instructions instead of 4: x · 65537, rounded to 24 bits, less x · 65536, which is exact,
// leaves x rounded to 8. An infinity or a NaN comes of |x| >= 2^111; below 2^-126 there are more bits left than bf16
// has there, for the caller to cut off.
static inline Vector in_eight_bits(Vector x) {
  const Vector large = x * 65536.0f;
  return (large + x) - large;
}

// How a value is made bf16: exactly, whatever it is, or as in_eight_bits does.
enum class Rounding { exact, bounded };
// Whether results of this size and more need exact rounding.
constexpr float UNBOUNDED = 0x1p111f;

template <Rounding ROUNDING>
static inline Bits packed_bfloat16(Pair pair) {
  if constexpr (ROUNDING == Rounding::exact)
    return (high_bfloat16(pair.first) >> 16) | (high_bfloat16(pair.second) & 0xffff0000u);
  else
    return ((Bits)in_eight_bits(pair.first) >> 16) | ((Bits)in_eight_bits(pair.second) & 0xffff0000u);
}

enum class Stores { cached, streamed };

template <class Format, Stores STORES = Stores::cached, Rounding ROUNDING = Rounding::exact>
static inline void store_pair(typename Format::Element* to, Pair pair, Whole step) {
  if constexpr (std::is_same_v<Format, BFloat16>) {
    const Bits bits = packed_bfloat16<ROUNDING>(pair);
    if constexpr (STORES == Stores::cached)
      __builtin_memcpy(to, &bits, sizeof bits);
    else
      stream(to, bits);
  } else if constexpr (STORES == Stores::cached) {
    store_in_order<Format>(to, pair, step);
  } else {
    stream(to, in_memory(Format{}, pair.first));
    stream(to + LANES, in_memory(Format{}, pair.second));
  }
}
template <class Format, Stores STORES = Stores::cached, Rounding ROUNDING = Rounding::exact>
static inline void store_pair(typename Format::Element* to, Pair pair, Rest step) {
  store_in_order<Format>(to, pair, step);
}

// What becomes of values that are stored and loaded again.
template <class Format, Rounding ROUNDING>
static inline Pair rounded(Pair pair) {
  if constexpr (std::is_same_v<Format, Float16>)
    return {from_float16(to_float16(pair.first)), from_float16(to_float16(pair.second))};
  else if constexpr (std::is_same_v<Format, BFloat16> && ROUNDING == Rounding::bounded)
    return {in_eight_bits(pair.first), in_eight_bits(pair.second)};
  else if constexpr (std::is_same_v<Format, BFloat16>)
    return {(Vector)(high_bfloat16(pair.first) & 0xffff0000u), (Vector)(high_bfloat16(pair.second) & 0xffff0000u)};
  else
    return pair;
}

// Stores what `rounded` returned: nothing is left to be rounded.
template <class Format, Stores STORES>
static inline void store_rounded(typename Format::Element* to, Pair pair, Whole step) {
  if constexpr (std::is_same_v<Format, BFloat16>) {
    const Bits bits = ((Bits)pair.first >> 16) | ((Bits)pair.second & 0xffff0000u);
    if constexpr (STORES == Stores::cached)
      __builtin_memcpy(to, &bits, sizeof bits);
    else
      stream(to, bits);
  } else {
    store_pair<Format, STORES>(to, pair, step);
  }
}
template <class Format, Stores STORES>
static inline void store_rounded(typename Format::Element* to, Pair pair, Rest step) {
  store_in_order<Format>(to, pair, step);
}

}  // namespace trilby::TRILBY_LEVEL
