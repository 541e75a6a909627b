"""The gradient of queries: a program owns a tile of them and walks over the keys that it sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_backward import BackwardInputs, gradient_of_scores
from .attention_score import GUARD_BLOCK, Rule, Scoring, band_of, has_nan, hides, scoring_of, signed, weigh
from .attention_sequence import Sequences, Stages, key_stages, sequence_of
from .attention_tiles import AttentionTiles
from .call import Call
from .dropout import is_kept
from .tile import Head, Heads, head_of, load_tokens, token_pointers


class QueryRows(NamedTuple):
    """The queries that a program owns, and what comes with each."""

    tile: tl.tensor  # [BLOCK_M, BLOCK_D]
    grad_output: tl.tensor  # [BLOCK_M, BLOCK_DV]
    exponent: tl.tensor  # [BLOCK_M, 1] float32
    delta: tl.tensor  # [BLOCK_M, 1] float32
    queries: tl.tensor  # [BLOCK_M, 1]: each row's number in its sequence
    positions: tl.tensor  # and in the tensor
    plane: tl.tensor  # the head, counted through the batch


@triton.jit
def gather_from_keys(
    grad_query_tile: tl.tensor,  # [BLOCK_M, BLOCK_D] float32
    rows: QueryRows,
    key: Head,
    value: Head,
    first_key: tl.tensor,  # a multiple of BLOCK_N
    end_key: tl.tensor,
    low: tl.tensor,  # the MASKED stage reads keys low <= j < end
    end: tl.tensor,
    rule: Rule,
    scoring: Scoring,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Add what the keys first_key <= j < end_key contribute; only the MASKED stage looks at the window and the end."""
    BLOCK_D: tl.constexpr = rows.tile.shape[1]
    BLOCK_DV: tl.constexpr = rows.grad_output.shape[1]
    for start in tl.range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        key_tile = load_tokens(key, start, low, end, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, ADDRESSES)
        value_tile = load_tokens(value, start, low, end, VALUE_DIM, BLOCK_N, BLOCK_DV, MASKED, ADDRESSES)
        products = tl.dot(rows.tile, tl.trans(key_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        grad_products = tl.dot(rows.grad_output, tl.trans(value_tile), input_precision=PRECISION)
        kept = None
        if rule.seed is not None:
            kept = is_kept(rule.seed, rows.plane, rows.positions, start, rule.dropout_threshold, BLOCK_N)
        _, scores, grad_scores = gradient_of_scores(
            products, grad_products, rows.queries, keys, rows.exponent, rows.delta, kept, rule, scoring, MASKED
        )
        grad_query_tile = weigh(grad_scores, scores, key_tile, grad_query_tile, GUARDED, PRECISION)
    return grad_query_tile


@triton.jit
def gather_in_stages(
    rows: QueryRows,
    key: Head,
    value: Head,
    stages: Stages,
    rule: Rule,
    scoring: Scoring,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GUARDED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The gradient of the rows [BLOCK_M, BLOCK_D], but for the scale."""
    grad_query_tile = tl.zeros(rows.tile.shape, dtype=tl.float32)
    if GUARDED:
        masked_first = stages.first  # which is rare enough for one loop
    else:
        masked_first = stages.full_end
        if rule.window_left is not None:
            grad_query_tile = gather_from_keys(
                grad_query_tile, rows, key, value, stages.first, stages.full_first, stages.low, stages.end,
                rule, scoring, HEAD_DIM, VALUE_DIM, BLOCK_N, True, False, ADDRESSES, PRECISION,
            )  # fmt: skip
        grad_query_tile = gather_from_keys(
            grad_query_tile, rows, key, value, stages.full_first, stages.full_end, stages.low, stages.end,
            rule, scoring, HEAD_DIM, VALUE_DIM, BLOCK_N, False, False, ADDRESSES, PRECISION,
        )  # fmt: skip
    return gather_from_keys(
        grad_query_tile, rows, key, value, masked_first, stages.end, stages.low, stages.end,
        rule, scoring, HEAD_DIM, VALUE_DIM, BLOCK_N, True, GUARDED, ADDRESSES, PRECISION,
    )  # fmt: skip


# Operations: 2 * T * S * (2 D + Dv) multiply-adds a head (half of that if causal), one exp2 a score.
# Memory: query, grad_output and grad_query once; key and value once per BLOCK_M queries, mostly from L2.
@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "q_tiles"])
def attention_backward_query_kernel(
    grad_output: Heads,  # [B, H, T, Dv]
    query: Heads,  # [B, H, T, D]
    key: Heads,  # [B, Hkv, S, D]
    value: Heads,  # [B, Hkv, S, Dv]
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    grad_query: tl.tensor,  # [B, H, T, D], in memory (B, T, H, D)
    sequences: Sequences,
    rule: Rule,
    heads: tl.tensor,  # H
    group: tl.tensor,  # H // Hkv, the query heads that share a key head
    q_len: tl.tensor,  # T: the rows of query
    kv_len: tl.tensor,  # S: the rows of key
    q_tiles: tl.tensor,  # the most tiles of BLOCK_M queries that a sequence takes
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
) -> None:
    """The gradient of BLOCK_M queries of one head, from every key that they see."""
    program = tl.program_id(0)
    # The last queries of a causal head see the most keys: they start first.
    first_query = (q_tiles - 1 - program % q_tiles) * BLOCK_M
    head = program // q_tiles % heads
    sequence = sequence_of(sequences, program // q_tiles // heads, q_len, kv_len)
    end_key = tl.where(first_query < sequence.queries, sequence.keys, 0)
    scoring = scoring_of(rule, sequence.number, head, band_of(rule, sequence.queries, sequence.keys), MASK_ALIGNMENT)
    query_tile = load_tokens(
        head_of(query, sequence.query_batch, head, sequence.first_query, ALIGNMENT),
        first_query, 0, sequence.queries, HEAD_DIM, BLOCK_M, BLOCK_D, True, ADDRESSES,
    )  # fmt: skip
    grad_output_tile = load_tokens(
        head_of(grad_output, sequence.query_batch, head, sequence.first_query, ALIGNMENT),
        first_query, 0, sequence.queries, VALUE_DIM, BLOCK_M, BLOCK_DV, True, ADDRESSES,
    )  # fmt: skip
    queries = first_query + tl.arange(0, BLOCK_M)[:, None]
    row_mask = queries < sequence.queries
    positions = sequence.first_query + queries
    plane = sequence.query_batch * heads + head
    row_exponent = tl.load(exponent + plane * q_len + positions, mask=row_mask, other=float("inf"))
    row_delta = tl.load(delta + plane * q_len + positions, mask=row_mask, other=0.0)
    rows = QueryRows(signed(query_tile, rule), grad_output_tile, row_exponent, row_delta, queries, positions, plane)
    key_head = head_of(key, sequence.key_batch, head // group, sequence.first_key, ALIGNMENT)
    value_head = head_of(value, sequence.key_batch, head // group, sequence.first_key, ALIGNMENT)
    last_query = tl.minimum(first_query + BLOCK_M, sequence.queries) - 1
    stages = key_stages(first_query, last_query, 0, end_key, rule, scoring.band, BLOCK_N)
    grad_query_tile = gather_in_stages(
        rows, key_head, value_head, stages, rule, scoring,
        HEAD_DIM, VALUE_DIM, BLOCK_N, False, ADDRESSES, PRECISION,
    )  # fmt: skip
    if hides(rule):  # noqa: SIM102  # the compiler knows this, but not the next
        if has_nan(grad_query_tile):
            grad_query_tile = gather_in_stages(
                rows, key_head, value_head, stages, rule, scoring,
                HEAD_DIM, VALUE_DIM, GUARD_BLOCK, True, ADDRESSES, PRECISION,
            )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(
        token_pointers(grad_query, sequence.query_batch, q_len, positions.to(tl.int64), heads, head, dims, HEAD_DIM),
        (grad_query_tile * rule.scale).to(grad_query.dtype.element_ty),
        mask=row_mask & (dims < HEAD_DIM),
    )


def attention_backward_query_call(inputs: BackwardInputs, grad_query: torch.Tensor, tiles: AttentionTiles) -> Call:
    """The launch that fills `grad_query` [B, H, T, D]."""
    forward = inputs.forward
    q_tiles = triton.cdiv(forward.longest_query, tiles.block_m)
    return Call(
        kernel=attention_backward_query_kernel,
        grid=(forward.sequences * forward.query.shape[1] * q_tiles,),
        arguments={
            **inputs.arguments(tiles),
            "grad_query": grad_query,
            "q_tiles": q_tiles,
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
