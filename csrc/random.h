// Random words indexed by position: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), the generator of torch's own GPU kernels. A word depends on the seed and on where it is used and
// on nothing else, so a mask is never stored: the backward computes it again, and every level, thread count and device
// agrees. kernels/reference/random.py holds the same arithmetic.
//
// The word of (plane, row, column), with `group` = column / 64 and `lane` = column % 16:
//     counter = (group · 16 + lane, low half of row, high half of row, plane),  key = (low half, high half of the seed)
//     word    = output number column % 64 / 16
// so that a register of any width up to 16 lanes makes the four words of its lanes at once. About 180 instructions for
// 4 · LANES words.
#pragma once

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trilby::TRILBY_LEVEL {

typedef uint64_t Wides __attribute__((vector_size(4 * LANES)));

constexpr int RANDOM_GROUP = 64;  // columns

struct RandomKey {
  uint64_t seed;
  uint32_t plane;
};

// The 64-bit product of the low half of every 64-bit lane.
static inline Wides product_of_low_halves(Wides a, uint32_t factor) {
#if defined(__AVX512F__)
  return (Wides)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Wides)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Wides)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(factor));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

static inline void multiply_wide(Bits a, uint32_t factor, Bits& high, Bits& low) {
  const Wides even = product_of_low_halves((Wides)a, factor);
  const Wides odd = product_of_low_halves((Wides)a >> 32, factor);
  high = (Bits)((even >> 32) | (odd & 0xffffffff00000000u));
  low = (Bits)((even & 0xffffffffu) | (odd << 32));
}

static inline void philox(Bits (&counter)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    Bits high0, low0, high1, low1;
    multiply_wide(counter[0], 0xD2511F53u, high0, low0);
    multiply_wide(counter[2], 0xCD9E8D57u, high1, low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The words of the columns group · 64 … group · 64 + 63 of a row.
static inline void random_words(const RandomKey& key, uint64_t row, uint32_t group, uint32_t (&words)[RANDOM_GROUP]) {
  Bits lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = static_cast<uint32_t>(i);
  for (int first = 0; first < 16; first += LANES) {
    Bits counter[4] = {lanes + (group * 16 + static_cast<uint32_t>(first)), Bits{} + static_cast<uint32_t>(row),
                       Bits{} + static_cast<uint32_t>(row >> 32), Bits{} + key.plane};
    philox(counter, key.seed);
    for (int number = 0; number < 4; number++)
      __builtin_memcpy(words + number * 16 + first, &counter[number], sizeof(Bits));
  }
}

// ---- for a matrix of attention's probabilities
// -------------------------------------------------------------------------
//
// The 16-bit number of (plane, row, column):
//     counter = (low half of row, high half of row, column / 8, plane),  key = (low half, high half of the seed)
//     number  = low (column even) or high (odd) half of output word (column % 8) / 2
// With rows in the lanes, one call of Philox makes eight columns for each. Its even and odd lanes stay apart, in the
// low halves of 64-bit lanes, as its products come out, and the first two of its ten rounds need no product but of the
// row, computed once for all columns, and of the column, one for all rows: 108 instructions for 8 · LANES numbers.

constexpr int RANDOM_COLUMNS = 8;

struct RandomRound {
  uint32_t key0, key1;
  void next() {
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
};

// A vector of rows: what the first two rounds make of them, in even and odd lanes.
struct RandomRows {
  Wides first[2];   // row · 0xD2511F53, whose high half, with the plane and the key, enters …
  Wides second[2];  // … this product
};

// The high half of every 64-bit lane in its low half, whatever comes into the other: as a shuffle, which AVX-512 does
// beside the products, and not in their place, as it does shifts.
template <int... LANE>
static inline Wides high_halves(Wides wide, std::integer_sequence<int, LANE...>) {
  return (Wides)__builtin_shufflevector((Bits)wide, (Bits)wide, (LANE | 1)...);
}
static inline Wides high_halves(Wides wide) {
#if defined(__AVX512F__)
  return high_halves(wide, std::make_integer_sequence<int, LANES>{});
#else
  return wide >> 32;
#endif
}

static inline Wides broadcast_wide(uint32_t value) { return Wides{} + value; }

// The rows `first` … `first` + LANES - 1, which share the high half of their number.
static inline RandomRows random_rows(const RandomKey& key, uint64_t first) {
  Bits lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = static_cast<uint32_t>(i) + static_cast<uint32_t>(first);
  const Wides low[2] = {(Wides)lanes, (Wides)lanes >> 32};
  RandomRows rows;
  for (int parity = 0; parity < 2; parity++) {
    rows.first[parity] = product_of_low_halves(low[parity], 0xD2511F53u);
    const Wides high = (rows.first[parity] >> 32) ^ broadcast_wide(key.plane ^ static_cast<uint32_t>(key.seed >> 32));
    rows.second[parity] = product_of_low_halves(high, 0xCD9E8D57u);
  }
  return rows;
}

// The four output words of every row for the columns group · 8 … group · 8 + 7.
static inline void random_words(uint64_t seed, uint32_t high_of_rows, const RandomRows& rows, uint32_t group,
                                Bits (&words)[4]) {
  RandomRound round = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const uint64_t of_group = uint64_t{group} * 0xCD9E8D57u;
  const uint32_t other = static_cast<uint32_t>(of_group >> 32) ^ high_of_rows ^ round.key0;
  const uint64_t of_other = uint64_t{other} * 0xD2511F53u;
  round.next();
  Wides counter[4][2];
  for (int parity = 0; parity < 2; parity++) {
    counter[0][parity] = (rows.second[parity] >> 32) ^ broadcast_wide(static_cast<uint32_t>(of_group) ^ round.key0);
    counter[1][parity] = rows.second[parity];
    counter[2][parity] = rows.first[parity] ^ broadcast_wide(static_cast<uint32_t>(of_other >> 32) ^ round.key1);
    counter[3][parity] = broadcast_wide(static_cast<uint32_t>(of_other));
  }
  for (int i = 2; i < 10; i++) {
    round.next();
    for (int parity = 0; parity < 2; parity++) {
      const Wides product0 = product_of_low_halves(counter[0][parity], 0xD2511F53u);
      const Wides product1 = product_of_low_halves(counter[2][parity], 0xCD9E8D57u);
      counter[0][parity] = high_halves(product1) ^ counter[1][parity] ^ broadcast_wide(round.key0);
      counter[1][parity] = product1;
      counter[2][parity] = high_halves(product0) ^ counter[3][parity] ^ broadcast_wide(round.key1);
      counter[3][parity] = product0;
    }
  }
  for (int word = 0; word < 4; word++)
    words[word] = (Bits)((counter[word][0] & 0xffffffffu) | (counter[word][1] << 32));
}

}  // namespace trilby::TRILBY_LEVEL
