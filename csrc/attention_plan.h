// Which of the forward kernels computes a call: a pure function of its sizes and strides.
#pragma once

#include "kernels.h"

namespace trilby {

// Queries of a sequence, and of all heads that share its keys together, up to which the decode kernel is the faster.
constexpr int64_t DECODE_MOST_QUERIES = 8, DECODE_MOST_ROWS = 32;

static inline int64_t longest_query(const AttentionForward& problem) {
  const int32_t* starts = problem.sequences.query_starts;
  if (!starts) return problem.shape.query_length;
  int64_t longest = 0;
  for (int64_t n = 0; n < problem.sequences.count; n++) {
    const int64_t queries = starts[n + 1] - starts[n];
    if (queries > longest) longest = queries;
  }
  return longest;
}

// The decode kernel reads rows whose elements are adjacent, and drops nothing.
static inline bool decodes(const AttentionForward& problem) {
  const AttentionShape& shape = problem.shape;
  if (problem.rule.dropout.threshold || shape.key_heads == 0) return false;
  if ((problem.key.column != 1 && shape.head_dim > 1) || (problem.value.column != 1 && shape.value_dim > 1))
    return false;
  const int64_t queries = longest_query(problem);
  return queries <= DECODE_MOST_QUERIES && queries * (shape.query_heads / shape.key_heads) <= DECODE_MOST_ROWS;
}

// The forward kernel that computes `problem` soonest.
static inline auto forward_kernel(const Kernels& kernels, const AttentionForward& problem) {
  return decodes(problem) ? kernels.attention_decode : kernels.attention_forward;
}

}  // namespace trilby
