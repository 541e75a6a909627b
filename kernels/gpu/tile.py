"""What the Triton kernels share: loading a tile under masks, and strides of known alignment."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(stride: tl.tensor, ALIGNMENT: tl.constexpr) -> tl.tensor:
    """Widen a stride to 64 bits and promise the compiler that it is a multiple of ALIGNMENT elements."""
    return tl.multiple_of(stride.to(tl.int64), ALIGNMENT)


@triton.jit
def load_tile(
    pointers: tl.tensor,  # [rows, columns]
    row_mask: tl.tensor,  # [rows, 1]
    column_mask: tl.tensor,  # [1, columns]
    MASK_ROWS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Load a tile, with zeros where a mask that is in force is false."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_mask, other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=column_mask, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def token_pointers(
    tensor: tl.tensor,  # [B, H, T, D], in memory (B, T, H, D)
    batch: tl.tensor,
    length: tl.tensor,  # T
    tokens: tl.tensor,  # [rows, 1], 64 bits
    heads: tl.tensor,  # H
    head: tl.tensor,
    dims: tl.tensor,  # [1, columns]
    HEAD_DIM: tl.constexpr,  # D
) -> tl.tensor:
    """Where a tile of one head lies in a result, whose layout is always tokens first, then heads."""
    return tensor + ((batch * length + tokens) * heads + head) * HEAD_DIM + dims
