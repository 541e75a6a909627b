// Stores that pass the cache by: the line is written to memory without being read first, and evicts nothing. Memory
// must be aligned to the width of the store. What was streamed is visible to other threads after `finish_streaming`.
#pragma once

#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>  // alone: the rest of immintrin.h takes half a second to read
#endif

namespace trilby::TRILBY_LEVEL {

// A level without such stores stores as usual.
static inline void stream(void* to, Bits bits) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)bits);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)to, (__m256i)bits);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)to, (__m128i)bits);
#else
  __builtin_memcpy(to, &bits, sizeof bits);
#endif
}

static inline void stream(void* to, Vector vector) { stream(to, (Bits)vector); }

static inline void stream(void* to, Halves halves) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)to, (__m256i)halves);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)to, (__m128i)halves);
#elif defined(__SSE2__)
  _mm_stream_si64((long long*)to, (long long)halves);
#else
  __builtin_memcpy(to, &halves, sizeof halves);
#endif
}

static inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace trilby::TRILBY_LEVEL
