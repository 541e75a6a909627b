// What a kernel is to the rest of the extension: plain structs of pointers, sizes and strides, and one table of
// functions for each instruction-set level. Nothing here knows torch, and no kernel file includes anything that does:
// inline functions of foreign headers, compiled for AVX-512 and merged by the linker, would crash an older processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trilby {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// A [B, H, T, D] tensor; strides count elements and may be 0 (broadcast) or negative-free as torch guarantees.
struct View {
  void* data;
  int64_t batch, head, row, column;  // strides
};

// torch's threads: `run(workers, body, context)` calls body(worker, context) once for every worker in [0, workers).
struct Threads {
  int64_t count;
  void (*run)(int64_t workers, void (*body)(int64_t worker, void* context), void* context);
};

struct AttentionShape {
  int64_t batch, query_heads, key_heads;  // query_heads is a multiple of key_heads
  int64_t query_length, key_length;       // T and S
  int64_t head_dim, value_dim;            // D and Dv
  Dtype dtype;
  float scale;
  bool causal;  // query i sees keys 0..i
};

struct AttentionForward {
  AttentionShape shape;
  View query, key, value, output;
  float* logsumexp;  // [B, H, T] contiguous, natural logarithm
};

struct AttentionBackward {
  AttentionShape shape;
  View query, key, value, output, grad_output;
  const float* logsumexp;
  View grad_query, grad_key, grad_value;
};

// Every kernel of one instruction-set level.
struct Kernels {
  const char* level;
  void (*attention_forward)(const AttentionForward&, const Threads&);
  void (*attention_backward)(const AttentionBackward&, const Threads&);
};

// At least `bytes` of 64-byte-aligned memory that belongs to the calling thread until it asks again. It is kept from
// call to call: mapping a few hundred kilobytes anew costs more than a small attention.
void* thread_scratch(size_t bytes);

}  // namespace trilby
