// Which of the forward kernels computes which sequence of a call: a pure function of its own length, and of what all
// sequences have in common. What else is in the batch decides nothing, and so changes no bit of a sequence's results.
#pragma once

#include "kernels.h"

namespace trilby {

// Queries of a sequence, and of all heads that share its keys together, up to which the decode kernel is the faster.
constexpr int64_t DECODE_MOST_QUERIES = 8, DECODE_MOST_ROWS = 32;

// Queries up to which the decode kernel computes a sequence; 0: none. It reads rows whose elements are adjacent, and
// drops nothing.
static inline int64_t most_decoded(const AttentionForward& problem) {
  const AttentionShape& shape = problem.shape;
  if (problem.rule.dropout.threshold || shape.key_heads == 0 || shape.query_heads == 0) return 0;
  if ((problem.key.column != 1 && shape.head_dim > 1) || (problem.value.column != 1 && shape.value_dim > 1)) return 0;
  const int64_t of_rows = DECODE_MOST_ROWS / (shape.query_heads / shape.key_heads);
  return of_rows < DECODE_MOST_QUERIES ? of_rows : DECODE_MOST_QUERIES;
}

// Computes `problem`, each sequence by the kernel that ends it soonest.
static inline void attend(const Kernels& kernels, const AttentionForward& problem, const Threads& threads) {
  const AttentionSequences& sequences = problem.sequences;
  const int64_t most = most_decoded(problem);
  bool has_few = false, has_many = false;
  for (int64_t n = 0; n < sequences.count; n++) {
    const int64_t queries = sequences.queries_of(n, problem.shape.query_length);
    has_few |= queries > 0 && queries <= most;
    has_many |= queries > most;
  }
  if (!has_few) return kernels.attention_forward(problem, threads);
  if (!has_many) return kernels.attention_decode(problem, threads);
  AttentionForward part = problem;
  part.sequences.most_queries = most;
  kernels.attention_decode(part, threads);
  part.sequences.most_queries = sequences.most_queries;
  part.sequences.fewest_queries = most + 1;
  kernels.attention_forward(part, threads);
}

}  // namespace trilby
