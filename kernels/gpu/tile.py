"""What the Triton kernels share: tensors as kernels take them, loading a tile, and strides of known alignment."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A tensor [B, H, T, D] of any strides; `call.heads` makes one."""

    pointer: tl.tensor
    stride_b: tl.tensor  # as `call.unspecialized` writes numbers, and so the next two
    stride_h: tl.tensor
    stride_t: tl.tensor
    stride_d: tl.tensor


class Head(NamedTuple):
    """One head [T, D] of such a tensor."""

    pointer: tl.tensor
    stride_t: tl.tensor
    stride_d: tl.tensor


@triton.jit
def aligned(stride: tl.tensor, ALIGNMENT: tl.constexpr) -> tl.tensor:
    """Widen a stride to 64 bits and promise the compiler that it is a multiple of ALIGNMENT elements."""
    return tl.multiple_of(stride.to(tl.int64), ALIGNMENT)


@triton.jit
def stride_of(number: tl.tensor, ALIGNMENT: tl.constexpr) -> tl.tensor:
    """The stride that `call.unspecialized` was given, likewise."""
    return tl.multiple_of((number >> 1) - 2**61, ALIGNMENT)


@triton.jit
def head_of(heads: Heads, batch: tl.tensor, head: tl.tensor, first: tl.tensor, ALIGNMENT: tl.constexpr) -> Head:
    """Tokens `first`, first + 1, ... of one head."""
    stride_t = stride_of(heads.stride_t, ALIGNMENT)
    pointer = heads.pointer + batch * stride_of(heads.stride_b, ALIGNMENT)
    pointer += head.to(tl.int64) * stride_of(heads.stride_h, ALIGNMENT) + first * stride_t
    return Head(pointer, stride_t, heads.stride_d)


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
def load_tokens(
    head: Head,  # from token 0 on
    first: tl.tensor,
    low: tl.tensor,
    end: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
) -> tl.tensor:
    """Tokens first ... first + BLOCK - 1, [BLOCK, BLOCK_DIM]; if MASKED, only those with low <= number < end are read.

    ADDRESSES of "products" are computed anew for each row: a token times a stride, both of 32 bits, one instruction.
    Otherwise the tile's first address moves along; rows are at "narrow" offsets from it, of 32 bits, or "wide" ones.
    If ADDRESSES is a number, offsets are multiples of it, the stride; in MASKED tiles, which have fewer registers to
    spare, addresses are products all the same.
    """
    numbers = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    row_mask = (first + numbers >= low) & (first + numbers < end)
    IS_MOVING: tl.constexpr = ADDRESSES == "narrow" or ADDRESSES == "wide"
    if ADDRESSES == "products" or (MASKED and not IS_MOVING):
        ITEMSIZE: tl.constexpr = head.pointer.dtype.element_ty.primitive_bitwidth // 8
        # The compiler must not see that tokens grow evenly, or it keeps a moving pointer for each row.
        tokens = (tl.minimum(first, end) + numbers).to(tl.uint32).to(tl.int64)
        stride = (head.stride_t * ITEMSIZE).to(tl.uint32).to(tl.int64)
        rows = head.pointer.to(tl.pointer_type(tl.int8)) + tokens * stride
        pointers = rows.to(head.pointer.dtype) + dims * head.stride_d
    else:
        if ADDRESSES == "wide":
            offsets = numbers * head.stride_t + dims * head.stride_d
        elif ADDRESSES == "narrow":
            offsets = (numbers * head.stride_t + dims * head.stride_d).to(tl.int32)
        else:
            offsets = numbers * ADDRESSES + dims * head.stride_d
        pointers = head.pointer + first * head.stride_t + offsets
    return load_tile(pointers, row_mask, dims < DIM, MASKED, BLOCK_DIM != DIM)


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
