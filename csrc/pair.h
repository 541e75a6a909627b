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
  return {Format::load_vector(from), load_some<Format>(from + LANES, rest.count - LANES)};
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
  store_some<Format>(to + LANES, pair.second, rest.count - LANES);
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

static inline Pair from_bfloat16(Bits bits) { return {(Vector)(bits << 16), (Vector)(bits & 0xffff0000u)}; }

// In pair order.
template <class Format, class Step>
static inline Pair load_pair(const typename Format::Element* from, Step step) {
  return load_in_order<Format>(from, step);
}
template <>
inline Pair load_pair<BFloat16, Whole>(const uint16_t* from, Whole) {
  Bits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return from_bfloat16(bits);
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

// Quiet NaNs whose low half is 0, as `in_bfloat16` takes them.
static inline Pair quieted(Pair pair) {
  const Vector nan = (Vector)(Bits{} + 0x7fc00000u);
  return {pair.first != pair.first ? nan : pair.first, pair.second != pair.second ? nan : pair.second};
}

// Rounded to nearest even, as a register of bf16 in memory order: the high halves of all floats in one register, one up
// where the low halves, in another, are above the middle, or in the middle beside an odd one. 7 instructions for both
// registers with AVX-512; rounding each before they are packed takes 10. Even a sum that carries is right: into the
// exponent, and to infinity. A NaN stays one if its low half is 0. Arithmetic on such NaNs and numbers makes no others,
// so that no instruction asks for them; `quieted` lets other floats in.
static inline Bits in_bfloat16(Pair pair) {
  typedef uint16_t Words __attribute__((vector_size(4 * LANES)));
  const Bits first = (Bits)pair.first, second = (Bits)pair.second;
  const Words high = (Words)((first >> 16) | (second & 0xffff0000u));
  const Words low = (Words)((first & 0xffffu) | (second << 16));
#if defined(__AVX512BW__)
  const __mmask32 up = _mm512_cmpgt_epu16_mask((__m512i)(low | (high & 1)), _mm512_set1_epi16(-0x8000));
  return (Bits)_mm512_mask_add_epi16((__m512i)high, up, (__m512i)high, _mm512_set1_epi16(1));
#else
  return (Bits)(high - (Words)((low | (high & 1)) > 0x8000));  // a comparison is -1 where it holds
#endif
}

// PAIR elements as they are stored: a register of bf16, or two registers of another format.
template <class Register>
struct TwoRegisters {
  Register first, second;
};
static inline TwoRegisters<Vector> packed(Float32, Pair pair) { return {pair.first, pair.second}; }
static inline TwoRegisters<Halves> packed(Float16, Pair pair) {
  return {to_float16(pair.first), to_float16(pair.second)};
}
static inline Bits packed(BFloat16, Pair pair) { return in_bfloat16(pair); }
static inline Pair unpacked(Float32, TwoRegisters<Vector> two) { return {two.first, two.second}; }
static inline Pair unpacked(Float16, TwoRegisters<Halves> two) {
  return {from_float16(two.first), from_float16(two.second)};
}
static inline Pair unpacked(BFloat16, Bits bits) { return from_bfloat16(bits); }

enum class Stores { cached, streamed };

template <Stores STORES, class Element, class Register>
static inline void store_register(Element* to, Register value) {
  if constexpr (STORES == Stores::streamed)
    stream(to, value);
  else
    __builtin_memcpy(to, &value, sizeof value);
}
template <Stores STORES, class Element, class Register>
static inline void store_register(Element* to, TwoRegisters<Register> value) {
  store_register<STORES>(to, value.first);
  store_register<STORES>(to + LANES, value.second);
}

template <class Format, Stores STORES = Stores::cached>
static inline void store_pair(typename Format::Element* to, Pair pair, Whole) {
  store_register<STORES>(to, packed(Format{}, pair));
}
template <class Format, Stores STORES = Stores::cached>
static inline void store_pair(typename Format::Element* to, Pair pair, Rest step) {
  store_in_order<Format>(to, pair, step);
}

// Stores a pair in `to` and, if there is one, in `copy`, and returns what was stored.
template <class Format, Stores STORES>
static inline Pair stored_pair(typename Format::Element* to, typename Format::Element* copy, Pair pair, Whole) {
  const auto value = packed(Format{}, pair);
  store_register<STORES>(to, value);
  if constexpr (STORES == Stores::streamed) store_register<Stores::cached>(copy, value);
  return unpacked(Format{}, value);
}
template <class Format, Stores STORES>
static inline Pair stored_pair(typename Format::Element* to, typename Format::Element* copy, Pair pair, Rest step) {
  store_in_order<Format>(to, pair, step);
  if constexpr (STORES == Stores::streamed) store_in_order<Format>(copy, pair, step);
  return load_in_order<Format>(to, step);
}

}  // namespace trilby::TRILBY_LEVEL
