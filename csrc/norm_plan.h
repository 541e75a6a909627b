// How the rows of a norm are divided, and when its stores pass the cache by: pure functions of the sizes alone. They
// never ask for the number of threads, so that sums over rows are the same for every number of threads.
#pragma once

#include "kernels.h"

namespace trilby {

// Rows of so many columns are normalized several at once. The weights of a wide row (8 bytes a column, as floats) come
// from the second-level cache for every row anew; side by side, once for all of them: up to 1.08 times as fast at 12288
// columns in bf16; in fp32 the same from memory, 1.18 in the cache. Narrower rows are 1.04 to 1.28 times as slow side
// by side.
constexpr int64_t NORM_WIDE_ROW = 4096;

// Forward: rows of up to so many columns, as of a norm of each head's queries and keys, are computed LANES at a time.
constexpr int64_t NORM_NARROW_ROW = 256;

// Backward: wide rows that are computed side by side. They share what is loaded and stored for each column, which is
// more than the rows themselves: (1024, 12288) takes 0.87 of the time of rows one by one in fp32, 0.92 in bf16. Four
// take as long as one.
constexpr int NORM_BACKWARD_ROWS = 2;

// Backward: rows that share one partial sum of the weight gradients. At 128 rows the partial sums (written and read
// once: 16 bytes a column) are 1 % of what the rows themselves move (12 bytes an element in fp32). Fewer rows keep 64
// chunks for the threads; more than 128 chunks would make the sums themselves large.
//
// The partial sums of wide rows leave the second-level cache: 64 chunks of (1024, 12288) in bf16 moved a quarter of
// what its rows do. Half as many, in tasks as below: 1.13 times as fast there, in fp32, too. No chunk
// begins between rows that are computed side by side.
static inline int64_t norm_chunk_rows(const NormShape& shape) {
  const int64_t rows = shape.rows, chunks_of_few = shape.width < NORM_WIDE_ROW ? 64 : 32;
  int64_t chunk = (rows + chunks_of_few - 1) / chunks_of_few;
  if (chunk < 4) chunk = 4;
  if (chunk > 128) chunk = 128;
  const int64_t most_chunks = (rows + 127) / 128;
  if (chunk < most_chunks) chunk = most_chunks;
  return (chunk + NORM_BACKWARD_ROWS - 1) / NORM_BACKWARD_ROWS * NORM_BACKWARD_ROWS;
}

static inline int64_t norm_chunks(const NormShape& shape) {
  const int64_t chunk = norm_chunk_rows(shape);
  return shape.rows > chunk ? (shape.rows + chunk - 1) / chunk : 1;  // no rows: one chunk of zeros
}

// Backward: chunks in one task, which change no result. Nothing fetches the first rows of a task ahead, so that four
// tasks a thread are faster than one a chunk: 1.03 to 1.05 times at 768 columns, 0.99 to 1.02 at 1600.
static inline int64_t norm_task_chunks(int64_t chunks, int64_t threads) {
  return threads > 1 ? (chunks + 4 * threads - 1) / (4 * threads) : chunks;
}

// Forward: rows in one task, which change no result, and are a multiple of those that are normalized at once where they
// are many. Four tasks a thread balance; 2^20 elements make a task long enough for its first rows, which nothing
// fetched ahead, not to show (2^17, 10 rows of 12288: 1.09 times as slow; 2^14: 1.09 at (8192, 768)), and 2^14 outweigh
// the dealing of it.
static inline int64_t norm_task_rows(const NormShape& shape, int64_t threads) {
  const int64_t most = (int64_t{1} << 20) / shape.width, least = (int64_t{1} << 14) / shape.width;
  int64_t rows = shape.rows / (4 * threads);
  if (rows > most) rows = most;
  if (rows < least) rows = least;
  if (rows >= 4) return rows / 4 * 4;
  return rows > 1 ? rows : 1;
}

// Floats of shared memory that a call needs: weight and bias as floats, and in the backward the partial sums.
static inline int64_t norm_forward_workspace(const NormShape& shape) { return 2 * shape.width; }
static inline int64_t norm_backward_workspace(const NormShape& shape) {
  return (1 + 2 * norm_chunks(shape)) * shape.width;
}

}  // namespace trilby
