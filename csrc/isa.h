// Which instruction-set level runs: the best that the processor, the kernel and this build allow, or TRILBY_CPU_ISA.
#pragma once

#include "kernels.h"

namespace trilby {

// The levels built into this object that this machine can run, worst first; `count` is set to their number.
const Kernels* const* available_levels(int* count);

// The level in use. The first call chooses it: TRILBY_CPU_ISA if that names an available level, else the best.
const Kernels& kernels();

// Switches the level; false, and no change, where `level` is not available.
bool use_level(const char* level);

}  // namespace trilby
