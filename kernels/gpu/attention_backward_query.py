"""The gradient of queries: a program owns a tile of them and walks over the keys that it sees."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_backward import BackwardInputs
from .attention_launch import AttentionTiles
from .call import Call, needs_wide_offsets
from .tile import aligned, load_tile, token_pointers


@triton.jit
def gather_from_keys(
    grad_query_tile: tl.tensor,  # [BLOCK_M, BLOCK_D] float32
    query_tile: tl.tensor,  # [BLOCK_M, BLOCK_D]
    grad_output_tile: tl.tensor,  # [BLOCK_M, BLOCK_DV]
    row_exponent: tl.tensor,  # [BLOCK_M] float32
    row_delta: tl.tensor,  # [BLOCK_M] float32
    key: tl.tensor,  # at first_key
    value: tl.tensor,  # at first_key
    key_offsets: tl.tensor,  # [BLOCK_N, BLOCK_D]
    value_offsets: tl.tensor,  # [BLOCK_N, BLOCK_DV]
    key_step: tl.tensor,  # elements from one tile of keys to the next
    value_step: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    rows: tl.tensor,  # [BLOCK_M]
    kv_len: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add what the keys first_key <= j < end_key contribute; only the MASKED stage looks at diagonal and end."""
    BLOCK_N: tl.constexpr = key_offsets.shape[0]
    dim_mask = tl.arange(0, key_offsets.shape[1])[None, :] < HEAD_DIM
    value_dim_mask = tl.arange(0, value_offsets.shape[1])[None, :] < VALUE_DIM
    for start in tl.range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = keys[:, None] < kv_len
        key_tile = load_tile(key + key_offsets, key_mask, dim_mask, MASKED, key_offsets.shape[1] != HEAD_DIM)
        value_tile = load_tile(
            value + value_offsets, key_mask, value_dim_mask, MASKED, value_offsets.shape[1] != VALUE_DIM
        )
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        probabilities = tl.exp2(scores * scale_log2 - row_exponent[:, None])
        grad_probabilities = tl.dot(grad_output_tile, tl.trans(value_tile), input_precision=PRECISION)
        grad_scores = probabilities * (grad_probabilities - row_delta[:, None])
        if MASKED:
            visible = keys[None, :] < kv_len
            if IS_CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            grad_scores = tl.where(visible, grad_scores, 0.0)
        grad_query_tile = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad_query_tile, input_precision=PRECISION)
        key += key_step
        value += value_step
    return grad_query_tile, key, value


# Operations: 2 * T * S * (2 D + Dv) multiply-adds a head (half of that if causal), one exp2 a score.
# Memory: query, grad_output and grad_query once; key and value once per BLOCK_M queries, mostly from L2.
@triton.jit(
    do_not_specialize=[
        "grad_output_stride_b", "grad_output_stride_h", "grad_output_stride_t",
        "query_stride_b", "query_stride_h", "query_stride_t",
        "key_stride_b", "key_stride_h", "key_stride_t",
        "value_stride_b", "value_stride_h", "value_stride_t",
        "heads", "group", "q_len", "kv_len",
    ]
)  # fmt: skip
def attention_backward_query_kernel(
    grad_output: tl.tensor,  # [B, H, T, Dv]
    query: tl.tensor,  # [B, H, T, D]
    key: tl.tensor,  # [B, Hkv, S, D]
    value: tl.tensor,  # [B, Hkv, S, Dv]
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    grad_query: tl.tensor,  # [B, H, T, D], in memory (B, T, H, D)
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
    group: tl.tensor,  # H // Hkv
    q_len: tl.tensor,  # T
    kv_len: tl.tensor,  # S
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    WIDE_OFFSETS: tl.constexpr,  # 32 bits cannot hold the offsets inside a tile of keys or values
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradient of BLOCK_M queries of one head, from every key that they see."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    # The last queries of a causal head see the most keys: they start first.
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    head = program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    key_stride_t = aligned(key_stride_t, ALIGNMENT)
    value_stride_t = aligned(value_stride_t, ALIGNMENT)

    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows[:, None] < q_len
    row_offsets = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    value_dims = tl.arange(0, BLOCK_DV).to(tl.int64)[None, :]
    query += batch * aligned(query_stride_b, ALIGNMENT) + head.to(tl.int64) * aligned(query_stride_h, ALIGNMENT)
    query += row_offsets * aligned(query_stride_t, ALIGNMENT) + dims * query_stride_d
    grad_output += batch * aligned(grad_output_stride_b, ALIGNMENT)
    grad_output += head.to(tl.int64) * aligned(grad_output_stride_h, ALIGNMENT)
    grad_output += row_offsets * aligned(grad_output_stride_t, ALIGNMENT) + value_dims * grad_output_stride_d
    query_tile = load_tile(query, row_mask, dims < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    grad_output_tile = load_tile(grad_output, row_mask, value_dims < VALUE_DIM, True, VALUE_DIM != BLOCK_DV)
    statistics = (batch * heads + head) * q_len + rows
    row_exponent = tl.load(exponent + statistics, mask=rows < q_len, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < q_len, other=0.0)

    key += batch * aligned(key_stride_b, ALIGNMENT) + kv_head * aligned(key_stride_h, ALIGNMENT)
    value += batch * aligned(value_stride_b, ALIGNMENT) + kv_head * aligned(value_stride_h, ALIGNMENT)
    columns = tl.arange(0, BLOCK_N)[:, None]
    key_offsets = columns * key_stride_t + dims * key_stride_d
    value_offsets = columns * value_stride_t + value_dims * value_stride_d
    if not WIDE_OFFSETS:
        key_offsets = key_offsets.to(tl.int32)
        value_offsets = value_offsets.to(tl.int32)
    if IS_CAUSAL:
        end_key = tl.minimum(kv_len, first_row + BLOCK_M)
        unmasked_end = tl.minimum(kv_len, first_row + 1) // BLOCK_N * BLOCK_N
    else:
        end_key = kv_len
        unmasked_end = kv_len // BLOCK_N * BLOCK_N
    grad_query_tile = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    grad_query_tile, key, value = gather_from_keys(
        grad_query_tile, query_tile, grad_output_tile, row_exponent, row_delta,
        key, value, key_offsets, value_offsets, BLOCK_N * key_stride_t, BLOCK_N * value_stride_t,
        0, unmasked_end, rows, kv_len, scale * LOG2_E,
        HEAD_DIM, VALUE_DIM, False, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    grad_query_tile, key, value = gather_from_keys(
        grad_query_tile, query_tile, grad_output_tile, row_exponent, row_delta,
        key, value, key_offsets, value_offsets, BLOCK_N * key_stride_t, BLOCK_N * value_stride_t,
        unmasked_end, end_key, rows, kv_len, scale * LOG2_E,
        HEAD_DIM, VALUE_DIM, True, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    tl.store(
        token_pointers(grad_query, batch, q_len, row_offsets, heads, head, dims, HEAD_DIM),
        (grad_query_tile * scale).to(grad_query.dtype.element_ty),
        mask=row_mask & (dims < HEAD_DIM),
    )


def attention_backward_query_call(inputs: BackwardInputs, grad_query: torch.Tensor, tiles: AttentionTiles) -> Call:
    """The launch that fills `grad_query` [B, H, T, D]."""
    batch, heads, q_len = grad_query.shape[:3]
    return Call(
        kernel=attention_backward_query_kernel,
        grid=(batch * heads * triton.cdiv(q_len, tiles.block_m),),
        arguments={
            **inputs.arguments(tiles),
            "grad_query": grad_query,
            "WIDE_OFFSETS": needs_wide_offsets(tiles.block_n, inputs.key, inputs.value),
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
