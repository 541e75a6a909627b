"""Causal-softmax attention, forward: one pass over the keys, no T x T matrix in memory.

The online softmax is that of Milakov and Gimelshein (2018), the tiling that of FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_launch import AttentionTiles
from .call import Call, alignment_of, needs_wide_offsets, padded, strides
from .tile import aligned, load_tile, token_pointers


@triton.jit
def attend(
    accumulator: tl.tensor,  # [BLOCK_M, BLOCK_DV] float32, sum of exp2(score - row_max) * value
    row_max: tl.tensor,  # [BLOCK_M] float32, in units of log2
    row_sum: tl.tensor,  # [BLOCK_M] float32, sum of exp2(score - row_max)
    query_tile: tl.tensor,  # [BLOCK_M, BLOCK_D]
    key: tl.tensor,  # at first_key
    value: tl.tensor,  # at first_key
    key_offsets: tl.tensor,  # [BLOCK_N, BLOCK_D]
    value_offsets: tl.tensor,  # [BLOCK_N, BLOCK_DV]
    key_step: tl.tensor,  # elements from one tile of keys to the next
    value_step: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    rows: tl.tensor,  # [BLOCK_M], the query that each row of the tile is
    kv_len: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the keys first_key <= j < end_key; only the MASKED stage looks at the diagonal and the end."""
    BLOCK_N: tl.constexpr = key_offsets.shape[0]
    BLOCK_D: tl.constexpr = key_offsets.shape[1]
    BLOCK_DV: tl.constexpr = value_offsets.shape[1]
    columns = tl.arange(0, BLOCK_N)
    dim_mask = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    value_dim_mask = tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM
    for start in tl.range(first_key, end_key, BLOCK_N):
        keys = start + columns
        key_mask = keys[:, None] < kv_len
        key_tile = load_tile(key + key_offsets, key_mask, dim_mask, MASKED, HEAD_DIM != BLOCK_D)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = keys[None, :] < kv_len
            if IS_CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            # Scaled before it is masked: -inf * 0 would be NaN.
            scores = tl.where(visible, scores * scale_log2, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # A row that has seen only -inf keeps probabilities of 0 where -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probabilities = tl.exp2((scores if MASKED else scores * scale_log2) - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(probabilities, 1)
        value_tile = load_tile(value + value_offsets, key_mask, value_dim_mask, MASKED, VALUE_DIM != BLOCK_DV)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(probabilities.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)
        row_max = new_max
        key += key_step
        value += value_step
    return accumulator, row_max, row_sum, key, value


# Operations: 2 * T * S * (D + Dv) multiply-adds a head (half of that if causal), one exp2 and one fused
# multiply-add a score. Memory: query and output once; key and value once per BLOCK_M queries, of which all but
# the first reading usually comes from L2, because the programs of one head are neighbors in the grid.
@triton.jit(
    do_not_specialize=[
        "query_stride_b", "query_stride_h", "query_stride_t",
        "key_stride_b", "key_stride_h", "key_stride_t",
        "value_stride_b", "value_stride_h", "value_stride_t",
        "heads", "group", "q_len", "kv_len",
    ]
)  # fmt: skip
def attention_forward_kernel(
    query: tl.tensor,  # [B, H, T, D]
    key: tl.tensor,  # [B, Hkv, S, D]
    value: tl.tensor,  # [B, Hkv, S, Dv]
    output: tl.tensor,  # [B, H, T, Dv], in memory (B, T, H, Dv)
    logsumexp: tl.tensor,  # [B, H, T] float32, contiguous
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
    WIDE_OFFSETS: tl.constexpr,  # 32 bits cannot hold the offsets inside a tile of keys or values
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend with BLOCK_M queries of one head to every key that they may see."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    # The last tiles of a causal head have the most keys: they start first, and the short ones fill the gaps.
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    head = (program // tiles) % heads
    batch = (program // tiles // heads).to(tl.int64)
    kv_head = (head // group).to(tl.int64)

    query += batch * aligned(query_stride_b, ALIGNMENT) + head.to(tl.int64) * aligned(query_stride_h, ALIGNMENT)
    key += batch * aligned(key_stride_b, ALIGNMENT) + kv_head * aligned(key_stride_h, ALIGNMENT)
    value += batch * aligned(value_stride_b, ALIGNMENT) + kv_head * aligned(value_stride_h, ALIGNMENT)

    query_stride_t = aligned(query_stride_t, ALIGNMENT)
    key_stride_t = aligned(key_stride_t, ALIGNMENT)
    value_stride_t = aligned(value_stride_t, ALIGNMENT)

    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows[:, None] < q_len
    row_offsets = rows.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    value_dims = tl.arange(0, BLOCK_DV).to(tl.int64)[None, :]
    query_pointers = query + row_offsets * query_stride_t + dims * query_stride_d
    key_offsets = columns * key_stride_t + dims * key_stride_d
    value_offsets = columns * value_stride_t + value_dims * value_stride_d
    if not WIDE_OFFSETS:
        key_offsets = key_offsets.to(tl.int32)
        value_offsets = value_offsets.to(tl.int32)

    query_tile = load_tile(query_pointers, row_mask, dims < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    # The maximum of scaled scores is the scaled maximum of scores only if the scale is not negative.
    query_tile = tl.where(scale < 0.0, -query_tile, query_tile)
    scale_log2 = tl.abs(scale) * LOG2_E

    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if IS_CAUSAL:
        end_key = tl.minimum(kv_len, first_row + BLOCK_M)
        unmasked_end = tl.minimum(kv_len, first_row + 1) // BLOCK_N * BLOCK_N
    else:
        end_key = kv_len
        unmasked_end = kv_len // BLOCK_N * BLOCK_N
    accumulator, row_max, row_sum, key, value = attend(
        accumulator, row_max, row_sum, query_tile, key, value, key_offsets, value_offsets,
        BLOCK_N * key_stride_t, BLOCK_N * value_stride_t, 0, unmasked_end, rows, kv_len, scale_log2,
        HEAD_DIM, VALUE_DIM, False, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    accumulator, row_max, row_sum, key, value = attend(
        accumulator, row_max, row_sum, query_tile, key, value, key_offsets, value_offsets,
        BLOCK_N * key_stride_t, BLOCK_N * value_stride_t, unmasked_end, end_key, rows, kv_len, scale_log2,
        HEAD_DIM, VALUE_DIM, True, IS_CAUSAL, PRECISION,
    )  # fmt: skip

    is_empty = row_sum == 0.0
    accumulator = accumulator / tl.where(is_empty, 1.0, row_sum)[:, None]
    row_logsumexp = tl.where(is_empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    tl.store(logsumexp + (batch * heads + head) * q_len + rows, row_logsumexp, mask=rows < q_len)
    tl.store(
        token_pointers(output, batch, q_len, row_offsets, heads, head, value_dims, VALUE_DIM),
        accumulator.to(output.dtype.element_ty),
        mask=row_mask & (value_dims < VALUE_DIM),
    )


def attention_forward_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    is_causal: bool,
    scale: float,
    tiles: AttentionTiles,
    precision: str,
) -> Call:
    """The launch that fills `output` [B, H, T, Dv] and `logsumexp` [B, H, T] (float32, natural logarithm)."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    return Call(
        kernel=attention_forward_kernel,
        grid=(batch * heads * triton.cdiv(q_len, tiles.block_m),),
        arguments={
            "query": query,
            "key": key,
            "value": value,
            "output": output,
            "logsumexp": logsumexp,
            **strides("query", query, "bhtd"),
            **strides("key", key, "bhtd"),
            **strides("value", value, "bhtd"),
            "heads": heads,
            "group": heads // max(kv_heads, 1),
            "q_len": q_len,
            "kv_len": kv_len,
            "scale": scale,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ALIGNMENT": alignment_of(query, key, value),
            "WIDE_OFFSETS": needs_wide_offsets(tiles.block_n, key, value),
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(value_dim),
            "IS_CAUSAL": is_causal,
            "PRECISION": precision,
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
