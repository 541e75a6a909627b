"""Dropout by position: the random words of kernels/reference/ and csrc/random.h, four from one Philox call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factors(
    seed: tl.tensor,  # [1] int64
    rows: tl.tensor,  # [BLOCK_M, 1]
    first_column: tl.tensor,  # a multiple of 64
    threshold: tl.tensor,  # of 2^32, the words below which drop an element
    kept_scale: tl.tensor,
    BLOCK_N: tl.constexpr,  # a multiple of 64
) -> tl.tensor:
    """[BLOCK_M, BLOCK_N] float32 from first_column on: 0 where an element is dropped, kept_scale where not.

    Philox4x32-10 counts (16 * (column // 64) + column % 16, row, plane 0) and yields the words of the four columns
    that are 16 apart: a quarter of the calls that one a column would take.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    zero = tl.full([BLOCK_M, BLOCK_N // 4], 0, tl.int64)
    lanes = (zero + (tl.arange(0, BLOCK_N // 4) + first_column // 4)[None, :]).to(tl.uint32)
    row_low = ((zero + rows) & 0xFFFFFFFF).to(tl.uint32)
    row_high = ((zero + rows) >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), lanes, row_low, row_high, zero.to(tl.uint32))
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # word 2 i + j at [..., i, j]
    words = tl.permute(tl.reshape(words, [BLOCK_M, BLOCK_N // 64, 16, 4]), [0, 1, 3, 2])
    words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return tl.where(words >= threshold.to(tl.uint32), kept_scale, 0.0)


@triton.jit
def is_kept(
    seed: tl.tensor,  # [1] int64
    plane: tl.tensor,  # which head of which batch, or those of rows [BLOCK_M, 1]
    rows: tl.tensor,  # [BLOCK_M, 1]
    first_column: tl.tensor,  # a multiple of 8
    threshold: tl.tensor,  # of 2^16, the numbers below which drop a pair
    BLOCK_N: tl.constexpr,  # a multiple of 8
) -> tl.tensor:
    """Which pairs of an attention matrix are kept, [BLOCK_M, BLOCK_N] from first_column on.

    Philox4x32-10 counts (row, 0, column // 8, plane) and yields eight numbers of 16 bits: that of column % 8 is the
    low, if it is odd the high half of word column % 8 // 2.
    """
    groups = (tl.arange(0, BLOCK_N // 8) + first_column // 8)[None, :]
    zero = (rows + groups) * 0
    row, group = (zero + rows).to(tl.uint32), (zero + groups).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed), row, zero.to(tl.uint32), group, (zero + plane).to(tl.uint32)
    )  # [BLOCK_M, BLOCK_N / 8] each
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # word 2 i + j at [..., i, j]
    threshold = threshold.to(tl.uint32)
    kept = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(kept, [rows.shape[0], BLOCK_N])
