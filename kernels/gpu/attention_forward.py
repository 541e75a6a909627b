"""Attention, forward: one pass over the keys, no T x S matrix in memory.

The online softmax is that of Milakov and Gimelshein (2018), the tiling that of FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_inputs import AttentionInputs
from .attention_score import (
    GUARD_BLOCK,
    Rule,
    Scoring,
    band_of,
    exponentials,
    has_nan,
    hides,
    least_max,
    log2_unit,
    score,
    scoring_of,
    signed,
    weigh,
)
from .attention_sequence import Sequences, Stages, Tokens, key_stages, load_keys, sequence_of, tokens_of
from .attention_tiles import AttentionTiles
from .call import Call, addresses
from .dropout import is_kept
from .tile import Heads, head_of, load_tokens, token_pointers


class Rows(NamedTuple):
    """The queries that a program keeps, one a row: [BLOCK_M, 1] each, or one number for all."""

    tile: tl.tensor  # [BLOCK_M, BLOCK_D]
    queries: tl.tensor  # each row's number in its sequence
    positions: tl.tensor  # and in the tensor
    planes: tl.tensor  # its head, counted through the batch


# Columns that the lanes of a warp hold of a row of a product, on every NVIDIA tensor core before Blackwell's.
LANES = tl.constexpr(8)


@triton.jit
def sums_by_lane(tile: tl.tensor) -> tl.tensor:
    """Sums of every LANES-th column, [M, N] to [M, LANES]: lanes exchange nothing until the loop is over."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // LANES, LANES]), 1)


@triton.jit
def attend(
    accumulator: tl.tensor,  # [BLOCK_M, BLOCK_DV] float32, sum of exp(score - row_max) * value
    row_max: tl.tensor,  # [BLOCK_M] float32, in units of 1 / `log2_unit`
    row_sum: tl.tensor,  # [BLOCK_M, LANES] float32, which add up to the sum of exp(score - row_max)
    rows: Rows,
    key: Tokens,
    value: Tokens,
    first_key: tl.tensor,  # a multiple of BLOCK_N
    end_key: tl.tensor,
    low: tl.tensor,  # the MASKED stage reads keys low <= j < end
    end: tl.tensor,
    rule: Rule,
    scoring: Scoring,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the keys first_key <= j < end_key; only the MASKED stage looks at the window and the end."""
    for start in tl.range(first_key, end_key, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        key_tile = load_keys(key, start, low, end, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, ADDRESSES)
        products = tl.dot(rows.tile, tl.trans(key_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores, _ = score(products, rows.queries, keys, rule, scoring, MASKED)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * log2_unit(rule, scoring))
        probabilities = exponentials(scores, new_max[:, None], rule, scoring, False)
        decay = exponentials(row_max, new_max, rule, scoring, True)
        row_sum = row_sum * decay[:, None] + sums_by_lane(probabilities)
        if rule.seed is not None:
            kept = is_kept(rule.seed, rows.planes, rows.positions, start, rule.dropout_threshold, BLOCK_N)
            probabilities = tl.where(kept, probabilities, 0.0)
        value_tile = load_keys(value, start, low, end, VALUE_DIM, BLOCK_N, BLOCK_DV, MASKED, ADDRESSES)
        accumulator = accumulator * decay[:, None]
        accumulator = weigh(probabilities, scores, value_tile, accumulator, GUARDED, PRECISION)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
def attend_in_stages(
    rows: Rows,
    key: Tokens,
    value: Tokens,
    stages: Stages,
    rule: Rule,
    scoring: Scoring,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GUARDED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The output [BLOCK_M, BLOCK_DV] and logsumexp [BLOCK_M] of rows."""
    LN_2: tl.constexpr = 0.6931471805599453
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], least_max(rule), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M, LANES], dtype=tl.float32)
    if GUARDED:
        masked_first = stages.first  # which is rare enough for one loop
    else:
        masked_first = stages.full_end
        if rule.window_left is not None:
            accumulator, row_max, row_sum = attend(
                accumulator, row_max, row_sum, rows, key, value,
                stages.first, stages.full_first, stages.low, stages.end, rule, scoring,
                HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, ADDRESSES, PRECISION,
            )  # fmt: skip
        accumulator, row_max, row_sum = attend(
            accumulator, row_max, row_sum, rows, key, value,
            stages.full_first, stages.full_end, stages.low, stages.end, rule, scoring,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, ADDRESSES, PRECISION,
        )  # fmt: skip
    accumulator, row_max, row_sum = attend(
        accumulator, row_max, row_sum, rows, key, value,
        masked_first, stages.end, stages.low, stages.end, rule, scoring,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, GUARDED, ADDRESSES, PRECISION,
    )  # fmt: skip
    row_sum = tl.sum(row_sum, 1)
    is_empty = row_sum == 0.0
    output = accumulator / tl.where(is_empty, 1.0, row_sum)[:, None]
    if rule.seed is not None:
        output *= rule.dropout_scale
    natural = tl.log2(row_sum) * LN_2
    if rule.mask is not None:
        natural += row_max
    else:
        natural += row_max * LN_2
    logsumexp = tl.where(is_empty, float("-inf"), natural)
    return output, logsumexp


@triton.jit
def attend_to_all(
    rows: Rows,
    key: Tokens,
    value: Tokens,
    first_query: tl.tensor,  # of the rows
    last_query: tl.tensor,
    first_key: tl.tensor,  # a multiple of BLOCK_N
    end_key: tl.tensor,
    rule: Rule,
    scoring: Scoring,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The output [BLOCK_M, BLOCK_DV] and logsumexp [BLOCK_M] of rows over the keys first_key <= j < end_key."""
    stages = key_stages(first_query, last_query, first_key, end_key, rule, scoring.band, BLOCK_N)
    output, logsumexp = attend_in_stages(
        rows, key, value, stages, rule, scoring,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, ADDRESSES, PRECISION,
    )  # fmt: skip
    if hides(rule):  # noqa: SIM102  # the compiler knows this, but not the next
        if has_nan(output):
            output, logsumexp = attend_in_stages(
                rows, key, value, stages, rule, scoring,
                HEAD_DIM, VALUE_DIM, BLOCK_M, GUARD_BLOCK, BLOCK_D, BLOCK_DV, True, ADDRESSES, PRECISION,
            )  # fmt: skip
    return output, logsumexp


# Operations: 2 * T * S * (D + Dv) multiply-adds a head (half of that if causal), one exp2 and one fused
# multiply-add a score. Memory: query and output once; key and value once per BLOCK_M queries, of which all but
# the first reading usually comes from L2, because the programs of one head are neighbors in the grid.
@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "q_tiles"])
def attention_forward_kernel(
    query: Heads,  # [B, H, T, D]
    key: Heads,  # [B, Hkv, S, D]
    value: Heads,  # [B, Hkv, S, Dv]
    output: tl.tensor,  # [B, H, T, Dv], in memory (B, T, H, Dv)
    logsumexp: tl.tensor,  # [B, H, T] float32, contiguous
    sequences: Sequences,
    rule: Rule,
    heads: tl.tensor,  # H
    group: tl.tensor,  # H // Hkv, the query heads that share a key head
    q_len: tl.tensor,  # T: the rows of query
    kv_len: tl.tensor,  # S: the rows of key; paged, the most keys of a sequence
    q_tiles: tl.tensor,  # the most tiles of BLOCK_M queries that a sequence takes
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    MASK_ALIGNMENT: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `call.addresses`
    KEY_ADDRESSES: tl.constexpr,  # `key_addresses`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend with BLOCK_M queries of one head to every key that they may see."""
    program = tl.program_id(0)
    # The last tiles of a causal head have the most keys: they start first, and the short ones fill the gaps.
    first_query = (q_tiles - 1 - program % q_tiles) * BLOCK_M
    head = (program // q_tiles) % heads
    sequence = sequence_of(sequences, program // q_tiles // heads, q_len, kv_len)
    end_key = tl.where(first_query < sequence.queries, sequence.keys, 0)
    scoring = scoring_of(rule, sequence.number, head, band_of(rule, sequence.queries, sequence.keys), MASK_ALIGNMENT)
    query_tile = load_tokens(
        head_of(query, sequence.query_batch, head, sequence.first_query, ALIGNMENT),
        first_query, 0, sequence.queries, HEAD_DIM, BLOCK_M, BLOCK_D, True, ADDRESSES,
    )  # fmt: skip
    queries = first_query + tl.arange(0, BLOCK_M)[:, None]
    positions = sequence.first_query + queries
    plane = sequence.query_batch * heads + head
    rows = Rows(signed(query_tile, rule), queries, positions, plane)
    output_tile, row_logsumexp = attend_to_all(
        rows,
        tokens_of(
            key, head // group, sequence, sequences, ALIGNMENT, HEAD_DIM, BLOCK_N, BLOCK_D, KEY_ADDRESSES
        ),
        tokens_of(
            value, head // group, sequence, sequences, ALIGNMENT, VALUE_DIM, BLOCK_N, BLOCK_DV, KEY_ADDRESSES
        ),
        first_query, tl.minimum(first_query + BLOCK_M, sequence.queries) - 1, 0, end_key, rule, scoring,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, KEY_ADDRESSES, PRECISION,
    )  # fmt: skip
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    row_mask = queries < sequence.queries
    tl.store(
        token_pointers(output, sequence.query_batch, q_len, positions.to(tl.int64), heads, head, value_dims, VALUE_DIM),
        output_tile.to(output.dtype.element_ty),
        mask=row_mask & (value_dims < VALUE_DIM),
    )
    tl.store(logsumexp + plane * q_len + positions, row_logsumexp[:, None], mask=row_mask)


def by_descriptor(tensor: torch.Tensor, block: int, is_paged: bool) -> bool:
    """Whether a descriptor can load tiles of `block` rows of keys or values [B, Hkv, S, D], packed or not.

    The tensor memory accelerator wants columns side by side, and all else at multiples of 16 bytes.
    Pages are scattered; and tiles as small as those that are guarded are loaded as they are.
    """
    itemsize = tensor.element_size()
    address = tensor.storage_offset() * itemsize if tensor.device.type == "meta" else tensor.data_ptr()
    return (
        not is_paged
        and block > GUARD_BLOCK.value
        and tensor.stride(-1) == 1
        and 0 < tensor.stride(-2) * itemsize < 2**32
        and all(stride * itemsize % 16 == 0 for stride in tensor.stride()[:-1])
        and address % 16 == 0
    )


def key_addresses(tiles: AttentionTiles, key: torch.Tensor, value: torch.Tensor, is_paged: bool = False) -> str | int:
    """How addresses of keys and values are computed: what `load_tokens` calls ADDRESSES, "descriptors" or "pages"."""
    if tiles.descriptors and all(by_descriptor(tensor, tiles.block_n, is_paged) for tensor in (key, value)):
        return "descriptors"
    if is_paged:
        return "pages"
    stride = key.stride(-2)
    if tiles.compiled_stride and stride == value.stride(-2) and tiles.block_n * stride < 2**31:
        return stride
    return addresses(tiles.products, (tiles.block_n, key), (tiles.block_n, value))


def attention_forward_call(
    inputs: AttentionInputs,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    tiles: AttentionTiles,
) -> Call:
    """The launch that fills `output` [B, H, T, Dv] and `logsumexp` [B, H, T] (float32, natural logarithm)."""
    key_loads = key_addresses(tiles, inputs.key, inputs.value, inputs.options.block_table is not None)
    q_tiles = triton.cdiv(inputs.longest_query, tiles.block_m)
    return Call(
        kernel=attention_forward_kernel,
        grid=(inputs.sequences * inputs.query.shape[1] * q_tiles,),
        arguments={
            **inputs.arguments(tiles),
            "output": output,
            "logsumexp": logsumexp,
            "q_tiles": q_tiles,
            "ADDRESSES": addresses(tiles.products, (tiles.block_m, inputs.query)),
            "KEY_ADDRESSES": key_loads,
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
        makes_descriptors=key_loads == "descriptors",
    )
