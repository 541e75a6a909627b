"""The gradients of keys and values: a program owns a tile of them and walks over the queries that see it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_backward import BackwardInputs
from .attention_launch import AttentionTiles
from .call import Call, needs_wide_offsets
from .tile import aligned, load_tile, token_pointers


@triton.jit
def gather_from_queries(
    grad_key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D] float32
    grad_value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV] float32
    key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D]
    value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV]
    query: tl.tensor,  # row 0 of one head
    grad_output: tl.tensor,
    exponent: tl.tensor,
    delta: tl.tensor,
    query_offsets: tl.tensor,  # [BLOCK_M, BLOCK_D]
    grad_output_offsets: tl.tensor,  # [BLOCK_M, BLOCK_DV]
    query_stride_t: tl.tensor,
    grad_output_stride_t: tl.tensor,
    first_row: tl.tensor,
    keys: tl.tensor,  # [BLOCK_N]
    q_len: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add what one tile of queries contributes; scores lie transposed, [BLOCK_N, BLOCK_M], ready to multiply."""
    BLOCK_M: tl.constexpr = query_offsets.shape[0]
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows[:, None] < q_len
    dim_mask = tl.arange(0, query_offsets.shape[1])[None, :] < HEAD_DIM
    value_dim_mask = tl.arange(0, grad_output_offsets.shape[1])[None, :] < VALUE_DIM
    query_tile = load_tile(
        query + first_row * query_stride_t + query_offsets,
        row_mask, dim_mask, MASKED, query_offsets.shape[1] != HEAD_DIM,
    )  # fmt: skip
    if MASKED:
        # An infinite exponent makes the probabilities of rows past the end 0.
        row_exponent = tl.load(exponent + rows, mask=rows < q_len, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=rows < q_len, other=0.0)
    else:
        row_exponent = tl.load(exponent + rows)
        row_delta = tl.load(delta + rows)
    scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    probabilities = tl.exp2(scores * scale_log2 - row_exponent[None, :])
    if MASKED and IS_CAUSAL:
        visible = keys[:, None] <= rows[None, :]
        probabilities = tl.where(visible, probabilities, 0.0)
    grad_output_tile = load_tile(
        grad_output + first_row * grad_output_stride_t + grad_output_offsets,
        row_mask, value_dim_mask, MASKED, grad_output_offsets.shape[1] != VALUE_DIM,
    )  # fmt: skip
    grad_value_tile = tl.dot(
        probabilities.to(grad_output_tile.dtype), grad_output_tile, grad_value_tile, input_precision=PRECISION
    )
    grad_probabilities = tl.dot(value_tile, tl.trans(grad_output_tile), input_precision=PRECISION)
    grad_scores = probabilities * (grad_probabilities - row_delta[None, :])
    if MASKED and IS_CAUSAL:
        grad_scores = tl.where(visible, grad_scores, 0.0)
    grad_key_tile = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key_tile, input_precision=PRECISION)
    return grad_key_tile, grad_value_tile


# Operations: 2 * T * S * (2 D + 2 Dv) multiply-adds a query head (half of that if causal), one exp2 a score.
# Memory: key, value and their gradients once; query and grad_output once per BLOCK_N keys, mostly from L2.
@triton.jit(
    do_not_specialize=[
        "grad_output_stride_b", "grad_output_stride_h", "grad_output_stride_t",
        "query_stride_b", "query_stride_h", "query_stride_t",
        "key_stride_b", "key_stride_h", "key_stride_t",
        "value_stride_b", "value_stride_h", "value_stride_t",
        "heads", "group", "q_len", "kv_len",
    ]
)  # fmt: skip
def attention_backward_key_value_kernel(
    grad_output: tl.tensor,  # [B, H, T, Dv]
    query: tl.tensor,  # [B, H, T, D]
    key: tl.tensor,  # [B, Hkv, S, D]
    value: tl.tensor,  # [B, Hkv, S, Dv]
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    grad_key: tl.tensor,  # [B, Hkv, S, D], in memory (B, S, Hkv, D)
    grad_value: tl.tensor,  # [B, Hkv, S, Dv], in memory (B, S, Hkv, Dv)
    grad_output_stride_b: tl.tensor,
    grad_output_stride_h: tl.tensor,
    grad_output_stride_t: tl.tensor,
    grad_output_stride_d: tl.tensor,
    query_stride_b: tl.tensor,
    query_stride_h: tl.tensor,
    query_stride_t: tl.tensor,
    query_stride_d: tl.tensor,
    key_stride_b: tl.tensor,
    key_stride_h: tl.tensor,
    key_stride_t: tl.tensor,
    key_stride_d: tl.tensor,
    value_stride_b: tl.tensor,
    value_stride_h: tl.tensor,
    value_stride_t: tl.tensor,
    value_stride_d: tl.tensor,
    heads: tl.tensor,  # H
    group: tl.tensor,  # H // Hkv, the query heads that share a key head
    q_len: tl.tensor,  # T
    kv_len: tl.tensor,  # S
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    WIDE_OFFSETS: tl.constexpr,  # 32 bits cannot hold the offsets inside a tile of queries
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradients of BLOCK_N keys and values of one key head, from every query of every head that reads them."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(kv_len, BLOCK_N)
    kv_heads = heads // group
    program = tl.program_id(0)
    # The first keys of a causal head are seen by the most queries: they start first.
    first_key = program % tiles * BLOCK_N
    kv_head = program // tiles % kv_heads
    batch = (program // tiles // kv_heads).to(tl.int64)
    query += batch * aligned(query_stride_b, ALIGNMENT)
    grad_output += batch * aligned(grad_output_stride_b, ALIGNMENT)
    query_stride_h = aligned(query_stride_h, ALIGNMENT)
    query_stride_t = aligned(query_stride_t, ALIGNMENT)
    grad_output_stride_h = aligned(grad_output_stride_h, ALIGNMENT)
    grad_output_stride_t = aligned(grad_output_stride_t, ALIGNMENT)

    keys = first_key + tl.arange(0, BLOCK_N)
    key_mask = keys[:, None] < kv_len
    key_offsets = keys.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    value_dims = tl.arange(0, BLOCK_DV).to(tl.int64)[None, :]
    key += batch * aligned(key_stride_b, ALIGNMENT) + kv_head.to(tl.int64) * aligned(key_stride_h, ALIGNMENT)
    value += batch * aligned(value_stride_b, ALIGNMENT) + kv_head.to(tl.int64) * aligned(value_stride_h, ALIGNMENT)
    key += key_offsets * aligned(key_stride_t, ALIGNMENT) + dims * key_stride_d
    value += key_offsets * aligned(value_stride_t, ALIGNMENT) + value_dims * value_stride_d
    key_tile = load_tile(key, key_mask, dims < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    value_tile = load_tile(value, key_mask, value_dims < VALUE_DIM, True, VALUE_DIM != BLOCK_DV)

    rows = tl.arange(0, BLOCK_M)[:, None]
    query_offsets = rows * query_stride_t + dims * query_stride_d
    grad_output_offsets = rows * grad_output_stride_t + value_dims * grad_output_stride_d
    if not WIDE_OFFSETS:
        query_offsets = query_offsets.to(tl.int32)
        grad_output_offsets = grad_output_offsets.to(tl.int32)

    # Queries in tiles: those that cross the diagonal are masked, so is one that crosses the end; the rest lie between.
    end_of_full = q_len // BLOCK_M * BLOCK_M
    has_end = end_of_full < q_len
    if IS_CAUSAL:
        has_end = has_end & (first_key < q_len)
        first_row = tl.minimum(first_key // BLOCK_M * BLOCK_M, end_of_full)
        first_unmasked = tl.minimum(tl.cdiv(first_key + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end_of_full)
    else:
        first_row = 0
        first_unmasked = 0
    masked_tiles = (first_unmasked - first_row) // BLOCK_M + has_end.to(tl.int32)
    unmasked_tiles = (end_of_full - first_unmasked) // BLOCK_M

    grad_key_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_value_tile = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    # One loop over the tiles of every head of the group: nested loops cost registers.
    for index in tl.range(0, group * masked_tiles):
        head = kv_head * group + index // masked_tiles
        row = first_row + index % masked_tiles * BLOCK_M
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile,
            query + head * query_stride_h, grad_output + head * grad_output_stride_h,
            exponent + (batch * heads + head) * q_len, delta + (batch * heads + head) * q_len,
            query_offsets, grad_output_offsets, query_stride_t, grad_output_stride_t,
            tl.where(row < first_unmasked, row, end_of_full), keys, q_len, scale * LOG2_E,
            HEAD_DIM, VALUE_DIM, True, IS_CAUSAL, PRECISION,
        )  # fmt: skip
    for index in tl.range(0, group * unmasked_tiles):
        head = kv_head * group + index // unmasked_tiles
        row = first_unmasked + index % unmasked_tiles * BLOCK_M
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile,
            query + head * query_stride_h, grad_output + head * grad_output_stride_h,
            exponent + (batch * heads + head) * q_len, delta + (batch * heads + head) * q_len,
            query_offsets, grad_output_offsets, query_stride_t, grad_output_stride_t,
            row, keys, q_len, scale * LOG2_E,
            HEAD_DIM, VALUE_DIM, False, IS_CAUSAL, PRECISION,
        )  # fmt: skip

    tl.store(
        token_pointers(grad_key, batch, kv_len, key_offsets, kv_heads, kv_head, dims, HEAD_DIM),
        (grad_key_tile * scale).to(grad_key.dtype.element_ty),
        mask=key_mask & (dims < HEAD_DIM),
    )
    tl.store(
        token_pointers(grad_value, batch, kv_len, key_offsets, kv_heads, kv_head, value_dims, VALUE_DIM),
        grad_value_tile.to(grad_value.dtype.element_ty),
        mask=key_mask & (value_dims < VALUE_DIM),
    )


def attention_backward_key_value_call(
    inputs: BackwardInputs, grad_key: torch.Tensor, grad_value: torch.Tensor, tiles: AttentionTiles
) -> Call:
    """The launch that fills `grad_key` [B, Hkv, S, D] and `grad_value` [B, Hkv, S, Dv]."""
    batch, kv_heads, kv_len = grad_key.shape[:3]
    return Call(
        kernel=attention_backward_key_value_kernel,
        grid=(batch * kv_heads * triton.cdiv(kv_len, tiles.block_n),),
        arguments={
            **inputs.arguments(tiles),
            "grad_key": grad_key,
            "grad_value": grad_value,
            "WIDE_OFFSETS": needs_wide_offsets(tiles.block_m, inputs.query, inputs.grad_output),
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
