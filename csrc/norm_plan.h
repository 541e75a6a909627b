// How the rows of a norm are divided, and when its stores pass the cache by: pure functions of the sizes alone. They
// never ask for the number of threads, so that sums over rows are the same for every number of threads.
#pragma once

#include "kernels.h"

namespace trilby {

// Backward: rows that share one partial sum of the weight gradients. At 64 rows the partial sums (written and read once:
// 16 bytes a column) are 2 % of what the rows themselves move (12 bytes an element in fp32). Fewer rows leave fewer
// than 64 chunks for the threads; more than 128 chunks would make the sums themselves large.
static inline int64_t norm_chunk_rows(int64_t rows) {
  int64_t chunk = (rows + 63) / 64;
  if (chunk < 4) chunk = 4;
  if (chunk > 64) chunk = 64;
  const int64_t most_chunks = (rows + 127) / 128;
  return chunk > most_chunks ? chunk : most_chunks;
}

static inline int64_t norm_chunks(int64_t rows) {
  const int64_t chunk = norm_chunk_rows(rows);
  return rows > chunk ? (rows + chunk - 1) / chunk : 1;  // no rows: one chunk of zeros
}

// Forward: rows in one task, about 64 KiB of floats, so that a task outweighs the dealing of it.
static inline int64_t norm_task_rows(int64_t width) { return width >= 16384 ? 1 : 16384 / width; }

// Floats of shared memory that a call needs: weight and bias as floats, and in the backward the partial sums.
static inline int64_t norm_forward_workspace(const NormShape& shape) { return 2 * shape.width; }
static inline int64_t norm_backward_workspace(const NormShape& shape) {
  return (1 + 2 * norm_chunks(shape.rows)) * shape.width;
}

// Results of this size and more are stored past the cache: a store that misses first reads the line it overwrites.
constexpr int64_t NORM_STREAMED_BYTES = int64_t{4} << 20;

}  // namespace trilby
