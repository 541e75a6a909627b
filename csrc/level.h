// The kernels of one instruction-set level, each in the file of its name.
#pragma once

#include "kernels.h"

// The level of all that is not attention in bf16: what products in bf16 gain nothing for is not compiled again for
// them.
#if defined(__AVX512BF16__)
#define TRILBY_VECTOR_LEVEL avx512
#else
#define TRILBY_VECTOR_LEVEL TRILBY_LEVEL
#endif

namespace trilby::TRILBY_VECTOR_LEVEL {

void attention_forward(const AttentionForward&, const Threads&);
void attention_decode(const AttentionForward&, const Threads&);
void attention_weights(const AttentionWeights&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);
void norm_forward(const NormForward&, const Threads&);
void norm_backward(const NormBackward&, const Threads&);
void linear(const Linear&, const Threads&);
void gelu(const Gelu&, const Threads&);

}  // namespace trilby::TRILBY_VECTOR_LEVEL

#if defined(__AVX512BF16__)
namespace trilby::TRILBY_LEVEL {

using avx512::attention_decode;
using avx512::gelu;
using avx512::linear;
using avx512::norm_backward;
using avx512::norm_forward;

void attention_forward(const AttentionForward&, const Threads&);
void attention_weights(const AttentionWeights&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);

#if defined(__AMX_BF16__)
// Whether the tile unit computes a small product as it should.
bool tiles_are_right();
#endif

}  // namespace trilby::TRILBY_LEVEL
#endif
