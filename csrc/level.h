// The kernels of one instruction-set level, each in the file of its name.
#pragma once

#include "kernels.h"

namespace trilby::TRILBY_LEVEL {

void attention_forward(const AttentionForward&, const Threads&);
void attention_decode(const AttentionForward&, const Threads&);
void attention_backward(const AttentionBackward&, const Threads&);
void norm_forward(const NormForward&, const Threads&);
void norm_backward(const NormBackward&, const Threads&);
void linear(const Linear&, const Threads&);
void gelu(const Gelu&, const Threads&);

}  // namespace trilby::TRILBY_LEVEL
