// What both forward kernels share: the scale in two parts, and what becomes of rows that no sequence owns.
#pragma once

#include "attention_score.h"

namespace trilby::TRILBY_LEVEL {

// The scale in two parts: the maximum is taken over scores times its sign. A scale of 0 is all sign: -inf · 0, of a
// hidden score, must not become a NaN. Adjusted scores are multiplied by the size before the softmax, others within it.
struct Scale {
  float sign, size, within;

  explicit Scale(const AttentionRule& rule)
      : sign(rule.scale == 0.0f ? 0.0f : __builtin_copysignf(1.0f, rule.scale)),
        size(rule.scale == 0.0f ? 1.0f : __builtin_fabsf(rule.scale)),
        within(adjusts(rule) ? 1.0f : size) {}
};

// Queries that belong to no sequence see nothing.
template <class Format>
static inline void clear_unowned_queries(const AttentionForward& problem) {
  const AttentionShape& shape = problem.shape;
  const AttentionSequences& sequences = problem.sequences;
  clear_unowned(sequences.query_starts, sequences.count, shape.query_length, [&](int64_t first, int64_t end) {
    for (int64_t head = 0; head < shape.query_heads; head++) {
      for (int64_t row = first; row < end; row++) problem.logsumexp[head * shape.query_length + row] = -INFINITE;
      clear_rows<Format>(problem.output, 0, head, first, end, shape.value_dim);
    }
  });
}

}  // namespace trilby::TRILBY_LEVEL
