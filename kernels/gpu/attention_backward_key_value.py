"""The gradients of keys and values: a program owns a tile of them and walks over the queries that see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_backward import BackwardInputs, gradient_of_scores
from .attention_score import Band, Rule, band_of, scoring_of, signed
from .attention_sequence import Sequence, Sequences, query_stages, sequence_of, sequence_of_slot
from .attention_tiles import AttentionTiles
from .call import Call
from .dropout import is_kept
from .tile import Head, Heads, head_of, load_tokens, stride_of, token_pointers


class QueryTile(NamedTuple):
    """Which tile of queries is next, of which head."""

    first: tl.tensor  # its first query
    query: Head
    grad_output: Head
    statistics: tl.tensor  # of the sequence's query 0, in [B, H, T]
    plane: tl.tensor  # the head, counted through the batch


class Walk(NamedTuple):
    """The tiles of queries that a program meets, and then those of the next head of the group."""

    begin: tl.tensor
    gap: tl.tensor  # where the masked tiles in front end, and
    gap_end: tl.tensor  # those behind begin
    end: tl.tensor
    query_stride: tl.tensor  # elements from a head to the next
    grad_output_stride: tl.tensor
    q_len: tl.tensor


@triton.jit
def after(tile: QueryTile, walk: Walk, BLOCK_M: tl.constexpr) -> QueryTile:
    """The next one. Counted, not divided: a division takes twenty instructions."""
    first = tile.first + BLOCK_M
    first = tl.where(first == walk.gap, walk.gap_end, first)
    is_last = first >= walk.end
    first = tl.where(is_last, walk.begin, first)
    query = tile.query.pointer + tl.where(is_last, walk.query_stride, 0)
    grad_output = tile.grad_output.pointer + tl.where(is_last, walk.grad_output_stride, 0)
    return QueryTile(
        first,
        Head(query, tile.query.stride_t, tile.query.stride_d),
        Head(grad_output, tile.grad_output.stride_t, tile.grad_output.stride_d),
        tile.statistics + tl.where(is_last, walk.q_len, 0),
        tile.plane + is_last.to(tl.int32),
    )


@triton.jit
def gather_from_queries(
    grad_key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D] float32
    grad_value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV] float32
    key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D]
    value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV]
    tile: QueryTile,
    exponent: tl.tensor,
    delta: tl.tensor,
    low: tl.tensor,  # the MASKED stage reads queries low <= i < end
    end: tl.tensor,
    first_key: tl.tensor,
    sequence: Sequence,
    rule: Rule,
    band: Band,
    heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add what one tile of queries contributes; scores lie transposed, [BLOCK_N, BLOCK_M], ready to multiply."""
    BLOCK_N: tl.constexpr = key_tile.shape[0]
    query_tile = load_tokens(tile.query, tile.first, low, end, HEAD_DIM, BLOCK_M, key_tile.shape[1], MASKED, ADDRESSES)
    queries = tile.first + tl.arange(0, BLOCK_M)[None, :]
    if MASKED:
        # An infinite exponent makes the probabilities of rows past the end 0.
        counts = (queries >= low) & (queries < end)
        row_exponent = tl.load(exponent + tile.statistics + queries, mask=counts, other=float("inf"))
        row_delta = tl.load(delta + tile.statistics + queries, mask=counts, other=0.0)
    else:
        row_exponent = tl.load(exponent + tile.statistics + queries)
        row_delta = tl.load(delta + tile.statistics + queries)
    products = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    grad_output_tile = load_tokens(
        tile.grad_output, tile.first, low, end, VALUE_DIM, BLOCK_M, value_tile.shape[1], MASKED, ADDRESSES
    )
    grad_products = tl.dot(value_tile, tl.trans(grad_output_tile), input_precision=PRECISION)
    kept = None
    if rule.seed is not None:
        positions = sequence.first_query + tile.first + tl.arange(0, BLOCK_M)[:, None]
        kept = tl.trans(is_kept(rule.seed, tile.plane, positions, first_key, rule.dropout_threshold, BLOCK_N))
    keys = first_key + tl.arange(0, BLOCK_N)[:, None]
    head = tile.plane % heads
    weights, _, grad_scores = gradient_of_scores(
        products, grad_products, queries, keys, row_exponent, row_delta, kept, rule,
        scoring_of(rule, sequence.number, head, band, MASK_ALIGNMENT), MASKED,
    )  # fmt: skip
    grad_value_tile = tl.dot(
        weights.to(grad_output_tile.dtype), grad_output_tile, grad_value_tile, input_precision=PRECISION
    )
    grad_key_tile = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key_tile, input_precision=PRECISION)
    return grad_key_tile, grad_value_tile


# Operations: 2 * T * S * (2 D + 2 Dv) multiply-adds a query head (half of that if causal), one exp2 a score.
# Memory: key, value and their gradients once; query and grad_output once per BLOCK_N keys, mostly from L2.
@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "k_tiles", "sequence_count"])
def attention_backward_key_value_kernel(
    grad_output: Heads,  # [B, H, T, Dv]
    query: Heads,  # [B, H, T, D]
    key: Heads,  # [B, Hkv, S, D]
    value: Heads,  # [B, Hkv, S, Dv]
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    grad_key: tl.tensor,  # [B, Hkv, S, D], in memory (B, S, Hkv, D)
    grad_value: tl.tensor,  # [B, Hkv, S, Dv], in memory (B, S, Hkv, Dv)
    sequences: Sequences,
    rule: Rule,
    heads: tl.tensor,  # H
    group: tl.tensor,  # H // Hkv, the query heads that share a key head
    q_len: tl.tensor,  # T: the rows of query
    kv_len: tl.tensor,  # S: the rows of key
    k_tiles: tl.tensor,  # the tiles of BLOCK_N keys of a sequence; packed, of all
    sequence_count: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    MASK_ALIGNMENT: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH_MASKED: tl.constexpr,
) -> None:
    """The gradients of BLOCK_N keys and values of one key head, from every query of every head that reads them."""
    kv_heads = heads // group
    program = tl.program_id(0)
    # The first keys of a causal head are seen by the most queries: they start first.
    tile = program % k_tiles
    kv_head = program // k_tiles % kv_heads
    number = program // k_tiles // kv_heads
    if sequences.key_starts is not None:
        number, tile = sequence_of_slot(sequences.key_starts, sequence_count, tile, BLOCK_N)
    sequence = sequence_of(sequences, number, q_len, kv_len)
    first_key = tile * BLOCK_N
    band = band_of(rule, sequence.queries, sequence.keys)
    key_tile = load_tokens(
        head_of(key, sequence.key_batch, kv_head, sequence.first_key, ALIGNMENT),
        first_key, 0, sequence.keys, HEAD_DIM, BLOCK_N, BLOCK_D, True, ADDRESSES,
    )  # fmt: skip
    key_tile = signed(key_tile, rule)
    value_tile = load_tokens(
        head_of(value, sequence.key_batch, kv_head, sequence.first_key, ALIGNMENT),
        first_key, 0, sequence.keys, VALUE_DIM, BLOCK_N, BLOCK_DV, True, ADDRESSES,
    )  # fmt: skip

    # Queries in tiles: those on the edges of the window and at the end are masked, the rest lies between.
    end_query = tl.where(first_key < sequence.keys, sequence.queries, 0)
    stages = query_stages(first_key, first_key + BLOCK_N - 1, end_query, rule, band, BLOCK_M)
    front = (stages.full_first - stages.first) // BLOCK_M
    masked_tiles = front + tl.maximum(tl.cdiv(stages.end - stages.full_end, BLOCK_M), 0)
    full_tiles = (stages.full_end - stages.full_first) // BLOCK_M
    grad_key_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_value_tile = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    head = kv_head * group
    plane = sequence.query_batch * heads + head
    query_head = head_of(query, sequence.query_batch, head, sequence.first_query, ALIGNMENT)
    grad_output_head = head_of(grad_output, sequence.query_batch, head, sequence.first_query, ALIGNMENT)
    query_stride = stride_of(query.stride_h, ALIGNMENT)
    grad_output_stride = stride_of(grad_output.stride_h, ALIGNMENT)
    statistics = plane * q_len + sequence.first_query
    # One loop over the tiles of every head of the group: nested loops cost registers.
    begin = tl.where(front > 0, stages.first, stages.full_end)
    walk = Walk(begin, stages.full_first, stages.full_end, stages.end, query_stride, grad_output_stride, q_len)
    tile = QueryTile(begin, query_head, grad_output_head, statistics, plane)
    MASKED_STAGES: tl.constexpr = None if PREFETCH_MASKED else 1
    for _ in tl.range(0, group * masked_tiles, num_stages=MASKED_STAGES):
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile, tile, exponent, delta, stages.low, stages.end,
            first_key, sequence, rule, band, heads,
            HEAD_DIM, VALUE_DIM, MASK_ALIGNMENT, BLOCK_M, True, ADDRESSES, PRECISION,
        )  # fmt: skip
        tile = after(tile, walk, BLOCK_M)
    walk = Walk(stages.full_first, -1, -1, stages.full_end, query_stride, grad_output_stride, q_len)
    tile = QueryTile(stages.full_first, query_head, grad_output_head, statistics, plane)
    for _ in tl.range(0, group * full_tiles):
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile, tile, exponent, delta, stages.low, stages.end,
            first_key, sequence, rule, band, heads,
            HEAD_DIM, VALUE_DIM, MASK_ALIGNMENT, BLOCK_M, False, ADDRESSES, PRECISION,
        )  # fmt: skip
        tile = after(tile, walk, BLOCK_M)
    if rule.seed is not None:
        grad_value_tile *= rule.dropout_scale

    keys = first_key + tl.arange(0, BLOCK_N)[:, None]
    exists = keys < sequence.keys
    is_stored = keys < sequence.key_rows
    key_rows = (sequence.first_key + keys).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(
        token_pointers(grad_key, sequence.key_batch, kv_len, key_rows, kv_heads, kv_head, dims, HEAD_DIM),
        tl.where(exists, grad_key_tile * rule.scale, 0.0).to(grad_key.dtype.element_ty),
        mask=is_stored & (dims < HEAD_DIM),
    )
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(
        token_pointers(grad_value, sequence.key_batch, kv_len, key_rows, kv_heads, kv_head, value_dims, VALUE_DIM),
        tl.where(exists, grad_value_tile, 0.0).to(grad_value.dtype.element_ty),
        mask=is_stored & (value_dims < VALUE_DIM),
    )


def attention_backward_key_value_call(
    inputs: BackwardInputs, grad_key: torch.Tensor, grad_value: torch.Tensor, tiles: AttentionTiles
) -> Call:
    """The launch that fills `grad_key` [B, Hkv, S, D] and `grad_value` [B, Hkv, S, Dv]."""
    batch, kv_heads, kv_len = grad_key.shape[:3]
    count = inputs.forward.sequences
    k_tiles = triton.cdiv(kv_len, tiles.block_n)
    if inputs.forward.options.key_starts is not None:
        k_tiles += count  # `sequence_of_slot`
    return Call(
        kernel=attention_backward_key_value_kernel,
        grid=(batch * kv_heads * k_tiles,),
        arguments={
            **inputs.arguments(tiles),
            "grad_key": grad_key,
            "grad_value": grad_value,
            "k_tiles": k_tiles,
            "sequence_count": count,
            "PREFETCH_MASKED": tiles.prefetch_masked,
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
