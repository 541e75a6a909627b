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

}  // namespace trilby::TRILBY_LEVEL
