// The table of one instruction-set level; setup.py compiles this file once for each.
#include "level.h"

namespace trilby::TRILBY_LEVEL {

#define TRILBY_NAME_OF(level) #level
#define TRILBY_NAME(level) TRILBY_NAME_OF(level)

extern const Kernels table;
const Kernels table = {TRILBY_NAME(TRILBY_LEVEL),
                       attention_forward,
                       attention_decode,
                       attention_weights,
                       attention_backward,
                       norm_forward,
                       norm_backward,
                       linear,
                       gelu};

}  // namespace trilby::TRILBY_LEVEL
