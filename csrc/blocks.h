// The blocks of a GPT, for the newest token of each sequence: kernels of this extension one after the other.
#pragma once

#include <vector>

#include "kernels.h"

namespace trilby {

struct NormWeights {
  const void *weight, *bias;  // [C], null where absent
};

// Of a linear layer [N, K]; as in `Linear`.
struct LinearWeights {
  int64_t outputs, inputs, row;
  const void *weight, *bias;
  const float* scales;
};

struct Block {
  NormWeights norm_1;
  LinearWeights attention_in, attention_out;
  NormWeights norm_2;
  LinearWeights expand, contract;
  View keys, values;  // [B, H, S, D], the elements of a row adjacent; the new ones are written
};

struct DecodeBlocks {
  int64_t rows, width, heads;  // B, C and H
  Dtype dtype;
  float eps;
  std::vector<Block> blocks;
  NormWeights last_norm;
  int64_t length;              // keys of the longest sequence, the new one among them
  const int32_t* key_lengths;  // [B], of each; null: `length` in all
  const void* stream;          // [B, C] contiguous, as `output`
  void* output;
};

// Bytes of memory for what lies between the kernels.
size_t decode_blocks_workspace(const DecodeBlocks&);

void decode_blocks(const DecodeBlocks&, void* workspace, const Threads&);

}  // namespace trilby
