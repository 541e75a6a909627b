// What a kernel is to the rest of the extension: plain structs of pointers, sizes and strides, and one table of
// functions for each instruction-set level. Nothing here knows torch, and no kernel file includes anything that does:
// inline functions of foreign headers, compiled for AVX-512 and merged by the linker, would crash an older processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trilby {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// A [B, H, T, D] tensor; strides count elements, and are 0 where it is broadcast.
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
  int64_t query_length, key_length;       // T and S: rows of query and of key; packed, those of all sequences together
  int64_t head_dim, value_dim;            // D and Dv
  Dtype dtype;
};

// Where sequences lie in the rows of query and key. As it stands: one to each index of the batch, of all its rows.
struct AttentionSequences {
  int64_t count = 0;  // B, or N of packed sequences
  // Packed [N + 1]: sequence n has the rows starts[n] … starts[n + 1] - 1 of batch 0. Null: not packed.
  const int32_t *query_starts = nullptr, *key_starts = nullptr;
  const int32_t* key_lengths = nullptr;  // [count]: only so many keys of a sequence exist. Null: all
  // Paged [count, pages]: keys p · page_size … of sequence n are the rows of batch block_table[n][p] of key and value.
  // key_length is then the most keys that a sequence can have, pages · page_size. Null: not paged.
  const int32_t* block_table = nullptr;
  int64_t pages = 0, page_size = 0;
  // Only sequences of so many queries are computed: the others are another kernel's.
  int64_t fewest_queries = 0, most_queries = INT64_MAX;

  int64_t queries_of(int64_t n, int64_t query_length) const {
    return query_starts ? query_starts[n + 1] - query_starts[n] : query_length;
  }
};

enum class Mask : int32_t { none, boolean, float32, bfloat16, float16 };  // boolean: bytes; others are added

// Drops what draws a random number below `threshold`, and multiplies the rest by `scale`.
struct Dropout {
  uint32_t threshold = 0;  // 0: no dropout. Norms draw 32 bits, attention 16
  float scale = 1.0f;
  uint64_t seed = 0;
};

// What is done to the score q · k of query i and key j of a sequence, in this order.
struct AttentionRule {
  float scale;                                 // s = q · k · scale
  float softcap = 0.0f;                        // s = softcap · tanh(s / softcap); 0: not
  const float* alibi_slopes = nullptr;         // s -= slope[sequence][head] · |i + offset - j|; null: not
  int64_t alibi_sequence = 0, alibi_head = 0;  // strides
  Mask mask_kind = Mask::none;
  View mask = {};            // [B, H, T, S]
  bool lower_right = false;  // offset = keys - queries of the sequence; otherwise 0
  // Seen where i + offset - window_left <= j <= i + offset + window_right; negative: unbounded. Causal is (-1, 0).
  int64_t window_left = -1, window_right = -1;
  Dropout dropout = {};  // of the probabilities
};

struct AttentionForward {
  AttentionShape shape;
  AttentionSequences sequences;
  AttentionRule rule;
  View query, key, value, output;  // paged, the batch of key and value is the page
  float* logsumexp;                // [B, H, T] contiguous, natural logarithm
};

// The probabilities of queries and keys that are not packed, where the rule is a scale and a boolean mask at most. Rows
// of weights have adjacent elements.
struct AttentionWeights {
  AttentionShape shape;  // of as many heads of keys as of queries
  AttentionRule rule;
  View query, key;
  const float* logsumexp;  // the forward's
  View weights;            // [B, H, T, S], or of all heads' mean [B, 1, T, S]
  bool of_all_heads;
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionSequences sequences;  // not paged
  AttentionRule rule;
  View query, key, value, output, grad_output;
  const float* logsumexp;
  View grad_query, grad_key, grad_value;
};

// Rows of adjacent elements. Row r, counted through `sizes` with the last dimension fastest, lies at the sum of its
// indices times `strides`, in elements.
struct Rows {
  static constexpr int MOST_DIMENSIONS = 4;
  void* data;
  int64_t dimensions, sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
};

struct NormShape {
  int64_t rows, width;
  Dtype dtype, weight_dtype;
  bool centered;  // layer norm; otherwise RMS norm
  float eps;
};

// All but `stream` and `branch` are contiguous. Null where absent: branch and summed (without a residual branch),
// weight, bias, mean (of an RMS norm).
struct NormForward {
  NormShape shape;
  Dropout dropout;
  Rows stream, branch;
  const void *weight, *bias;
  void *normalized, *summed;
  float *mean, *rstd;
  float* workspace;  // norm_forward_workspace floats
};

// Null where absent: grad_summed, weight, mean, grad_branch (without dropout), grad_weight, grad_bias.
struct NormBackward {
  NormShape shape;
  Dropout dropout;
  Rows grad_normalized, grad_summed, summed;
  const void* weight;
  const float *mean, *rstd;
  void *grad_stream, *grad_branch, *grad_weight, *grad_bias;
  float* workspace;  // norm_backward_workspace floats
};

// Rows of input times the transpose of a matrix of weights. `bias` is null where absent; weights are int8 where there
// are `scales`, one for each output, and of `dtype` else. Strides count elements.
struct Linear {
  int64_t rows, inputs, outputs;  // M, K and N
  Dtype dtype;                    // of input, bias and output
  const void* input;
  int64_t input_row, input_column;  // strides
  const void* weight;               // [N, K], the elements of a row adjacent
  int64_t weight_row;               // stride
  const float* scales;
  const void* bias;
  void* output;  // [M, N] contiguous
};

// GELU in its tanh form of `count` elements; of a gradient, where `grad_output` is not null.
struct Gelu {
  int64_t count;
  Dtype dtype;
  const void *input, *grad_output;
  void* output;
};

// Every kernel of one instruction-set level.
struct Kernels {
  const char* level;
  void (*attention_forward)(const AttentionForward&, const Threads&);
  void (*attention_decode)(const AttentionForward&, const Threads&);  // attention_plan.h says when
  void (*attention_weights)(const AttentionWeights&, const Threads&);
  void (*attention_backward)(const AttentionBackward&, const Threads&);
  void (*norm_forward)(const NormForward&, const Threads&);
  void (*norm_backward)(const NormBackward&, const Threads&);
  void (*linear)(const Linear&, const Threads&);
  void (*gelu)(const Gelu&, const Threads&);
};

// At least `bytes` of 64-byte-aligned memory that belongs to the calling thread until it asks again. It is kept from
// call to call: mapping a few hundred kilobytes anew costs more than a small attention.
void* thread_scratch(size_t bytes);

// A large tensor's memory may be new: it has no pages until it is written to, one fault at a time. Asked of the page in
// the middle, which takes 0.7 us. Where the system can't tell, memory counts as having pages.
bool has_pages(const void* memory, int64_t bytes);

// Gives memory that is about to be written its pages all at once; where the system can't, writing does it as ever.
void map_pages(void* memory, int64_t bytes);

}  // namespace trilby
