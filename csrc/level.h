// The kernels of one instruction-set level, each in the file of its name.
#pragma once

#include "kernels.h"

#if defined(__AMX_BF16__)
namespace trilby::avx512 {

// What the tile unit gains nothing for is the level's below, and not compiled again.
void attention_forward(const AttentionForward&, const Threads&);
void attention_decode(const AttentionForward&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);
void norm_forward(const NormForward&, const Threads&);
void norm_backward(const NormBackward&, const Threads&);
void linear(const Linear&, const Threads&);
void gelu(const Gelu&, const Threads&);

}  // namespace trilby::avx512
#endif

namespace trilby::TRILBY_LEVEL {

#if defined(__AMX_BF16__)
using avx512::attention_decode;
using avx512::gelu;
using avx512::linear;
using avx512::norm_backward;
using avx512::norm_forward;

void attention_forward(const AttentionForward&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);

// Whether the tile unit computes a small product as it should.
bool tiles_are_right();
#else

void attention_forward(const AttentionForward&, const Threads&);
void attention_decode(const AttentionForward&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);
void norm_forward(const NormForward&, const Threads&);
void norm_backward(const NormBackward&, const Threads&);
void linear(const Linear&, const Threads&);
void gelu(const Gelu&, const Threads&);
#endif

}  // namespace trilby::TRILBY_LEVEL
