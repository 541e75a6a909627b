// The level's products. Those in bf16, by vectors of pairs or on the tile unit, are of levels that compute it alone;
// the rest is avx512's.
#pragma once

#if defined(__AVX512BF16__)
#include "attention_tiles_backward.h"
#include "attention_tiles_forward.h"
#else
#include "attention_vectors_backward.h"
#include "attention_vectors_forward.h"
#endif

#include "level.h"

namespace trilby::TRILBY_LEVEL {

// Calls compute(format) for a call's format, or `vectors`, the vector level's kernel, where this level does not
// multiply the call.
template <class Problem, class Compute>
static inline void in_its_format(const Problem& problem, [[maybe_unused]] const Threads& threads,
                                 [[maybe_unused]] void (*vectors)(const Problem&, const Threads&),
                                 const Compute& compute) {
#if defined(__AVX512BF16__)
  if (!multiplied_by_tiles(problem.shape)) return vectors(problem, threads);
  compute(BFloat16{});
#else
  in_format(problem.shape.dtype, compute);
#endif
}

}  // namespace trilby::TRILBY_LEVEL
