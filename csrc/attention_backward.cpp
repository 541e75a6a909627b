#include "level.h"
namespace trilby::TRILBY_LEVEL {
void attention_backward(const AttentionBackward&, const Threads&) {}
}
