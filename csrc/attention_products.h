// The level's products. Those in bf16, by vectors of pairs or on the tile unit, are of levels that compute it alone;
// the rest is avx512's.
#pragma once

#if defined(__AVX512BF16__)
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif
