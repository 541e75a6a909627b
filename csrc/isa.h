// Which instruction-set level runs: the best that the processor, the kernel and this build allow, or TRILBY_CPU_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace trilby {

// The levels built into this object that this machine can run, worst first.
std::vector<const Kernels*> available_levels();

// Whether vectors multiply bf16 (level `avx512bf16`) faster than float32.
bool multiplies_pairs_fast();

// Why the level `amx` is not among them; empty where it is.
const std::string& why_not_amx();

// The level in use. The first call chooses it: TRILBY_CPU_ISA if that names an available level, else the best.
const Kernels& kernels();

// Switches the level; false, and no change, where `level` is not available.
bool use_level(const char* level);

}  // namespace trilby
