// The level's products: on the tile unit where there is one. Its level computes bf16 alone; the rest is the level's
// below.
#pragma once

#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif
