"""The gradients of keys and values: a program owns a tile of them and walks over the queries that see it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_backward import BackwardInputs, gradient_of_scores
from .attention_launch import AttentionTiles
from .attention_score import Band, Rule, band_of, scoring_of, signed
from .attention_sequence import Sequence, Sequences, query_stages, sequence_of, sequence_of_slot
from .call import Call, needs_wide_offsets
from .dropout import is_kept
from .tile import Heads, head_of, load_tokens, token_pointers


@triton.jit
def gather_from_queries(
    grad_key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D] float32
    grad_value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV] float32
    key_tile: tl.tensor,  # [BLOCK_N, BLOCK_D]
    value_tile: tl.tensor,  # [BLOCK_N, BLOCK_DV]
    query: Heads,
    grad_output: Heads,
    exponent: tl.tensor,
    delta: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    q_len: tl.tensor,
    first_query: tl.tensor,
    low: tl.tensor,  # the MASKED stage reads queries low <= i < end
    end: tl.tensor,
    first_key: tl.tensor,
    sequence: Sequence,
    rule: Rule,
    band: Band,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASK_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add what one tile of queries contributes; scores lie transposed, [BLOCK_N, BLOCK_M], ready to multiply."""
    BLOCK_N: tl.constexpr = key_tile.shape[0]
    query_tile = load_tokens(
        head_of(query, sequence.query_batch, head, sequence.first_query, ALIGNMENT),
        first_query, low, end, HEAD_DIM, BLOCK_M, key_tile.shape[1], MASKED, WIDE_OFFSETS,
    )  # fmt: skip
    plane = sequence.query_batch * heads + head
    queries = first_query + tl.arange(0, BLOCK_M)[None, :]
    statistics = plane * q_len + sequence.first_query + queries
    if MASKED:
        # An infinite exponent makes the probabilities of rows past the end 0.
        counts = (queries >= low) & (queries < end)
        row_exponent = tl.load(exponent + statistics, mask=counts, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=counts, other=0.0)
    else:
        row_exponent = tl.load(exponent + statistics)
        row_delta = tl.load(delta + statistics)
    products = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    grad_output_tile = load_tokens(
        head_of(grad_output, sequence.query_batch, head, sequence.first_query, ALIGNMENT),
        first_query, low, end, VALUE_DIM, BLOCK_M, value_tile.shape[1], MASKED, WIDE_OFFSETS,
    )  # fmt: skip
    grad_products = tl.dot(value_tile, tl.trans(grad_output_tile), input_precision=PRECISION)
    kept = None
    if rule.seed is not None:
        positions = sequence.first_query + first_query + tl.arange(0, BLOCK_M)[:, None]
        kept = tl.trans(is_kept(rule.seed, plane, positions, first_key, rule.dropout_threshold, BLOCK_N))
    keys = first_key + tl.arange(0, BLOCK_N)[:, None]
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
    WIDE_OFFSETS: tl.constexpr,  # 32 bits cannot hold the bytes from a token to the next
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
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
        first_key, 0, sequence.keys, HEAD_DIM, BLOCK_N, BLOCK_D, True, WIDE_OFFSETS,
    )  # fmt: skip
    key_tile = signed(key_tile, rule)
    value_tile = load_tokens(
        head_of(value, sequence.key_batch, kv_head, sequence.first_key, ALIGNMENT),
        first_key, 0, sequence.keys, VALUE_DIM, BLOCK_N, BLOCK_DV, True, WIDE_OFFSETS,
    )  # fmt: skip

    # Queries in tiles: those on the edges of the window and at the end are masked, the rest lies between.
    end_query = tl.where(first_key < sequence.keys, sequence.queries, 0)
    stages = query_stages(first_key, first_key + BLOCK_N - 1, end_query, band, BLOCK_M)
    front = (stages.full_first - stages.first) // BLOCK_M
    masked_tiles = front + tl.maximum(tl.cdiv(stages.end - stages.full_end, BLOCK_M), 0)
    full_tiles = (stages.full_end - stages.full_first) // BLOCK_M
    grad_key_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_value_tile = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    # One loop over the tiles of every head of the group: nested loops cost registers.
    for index in tl.range(0, group * masked_tiles):
        masked = index % masked_tiles
        first_query = tl.where(
            masked < front, stages.first + masked * BLOCK_M, stages.full_end + (masked - front) * BLOCK_M
        )
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile, query, grad_output, exponent, delta,
            kv_head * group + index // masked_tiles, heads, q_len, first_query, stages.low, stages.end,
            first_key, sequence, rule, band,
            HEAD_DIM, VALUE_DIM, ALIGNMENT, MASK_ALIGNMENT, BLOCK_M, True, WIDE_OFFSETS, PRECISION,
        )  # fmt: skip
    for index in tl.range(0, group * full_tiles):
        grad_key_tile, grad_value_tile = gather_from_queries(
            grad_key_tile, grad_value_tile, key_tile, value_tile, query, grad_output, exponent, delta,
            kv_head * group + index // full_tiles, heads, q_len,
            stages.full_first + index % full_tiles * BLOCK_M, stages.low, stages.end,
            first_key, sequence, rule, band,
            HEAD_DIM, VALUE_DIM, ALIGNMENT, MASK_ALIGNMENT, BLOCK_M, False, WIDE_OFFSETS, PRECISION,
        )  # fmt: skip
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
            "WIDE_OFFSETS": needs_wide_offsets(
                inputs.forward.query, inputs.forward.key, inputs.forward.value, inputs.grad_output
            ),
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
