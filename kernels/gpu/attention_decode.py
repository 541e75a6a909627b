"""Attention of a few queries to many keys: the keys are split between programs, whose results a second kernel merges.

A program holds all queries of all the heads that share a key head, so that keys and values are read once
(Flash-Decoding, Dao et al., 2023). Where keys are split depends on lengths alone, and results are merged in the order
of the splits: the same bits on every run, and for a sequence whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_forward import Rows, attend_to_all, key_addresses
from .attention_inputs import AttentionInputs
from .attention_launch import MOST_SPLITS
from .attention_score import Rule, band_of, scoring_of, signed
from .attention_sequence import Sequences, sequence_of, tokens_of
from .attention_tiles import DecodeTiles
from .call import Call, padded
from .tile import Heads, load_tile, stride_of, token_pointers


# Operations: as the forward's. Memory: key and value once, which is nearly all of it; 4 * (Dv + 1) bytes for each row
# and split, written here and read by the merge: 1% of the keys and values for splits of 512 and groups of 1.
@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "splits", "split_keys", "split_rows"])
def attention_decode_kernel(
    query: Heads,  # [B, H, T, D]
    key: Heads,  # [B, Hkv, S, D]
    value: Heads,  # [B, Hkv, S, Dv]
    output: tl.tensor,  # [splits, B, H, T, Dv], in memory (splits, B, T, H, Dv)
    logsumexp: tl.tensor,  # [splits, B, H, T] float32, contiguous
    sequences: Sequences,
    rule: Rule,
    heads: tl.tensor,  # H
    group: tl.tensor,  # H // Hkv, the query heads that share a key head
    q_len: tl.tensor,  # T: the rows of query
    kv_len: tl.tensor,  # S: the rows of key; paged, the most keys of a sequence
    splits: tl.tensor,
    split_keys: tl.tensor,  # keys in a split, a multiple of BLOCK_N
    split_rows: tl.tensor,  # B * H * T
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    MASK_ALIGNMENT: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `attention_forward.key_addresses`
    BLOCK_M: tl.constexpr,  # at least group * T
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend with every query of the heads that share a key head to the keys of one split."""
    kv_heads = heads // group
    program = tl.program_id(0)
    split = program % splits
    kv_head = program // splits % kv_heads
    sequence = sequence_of(sequences, program // splits // kv_heads, q_len, kv_len)
    row = tl.arange(0, BLOCK_M)[:, None]
    queries = row // group
    row_mask = queries < sequence.queries
    head = kv_head * group + row % group
    positions = sequence.first_query + queries
    dims = tl.arange(0, BLOCK_D)[None, :]
    pointers = query.pointer + sequence.query_batch * stride_of(query.stride_b, ALIGNMENT)
    pointers += head * stride_of(query.stride_h, ALIGNMENT) + positions * stride_of(query.stride_t, ALIGNMENT)
    query_tile = load_tile(pointers + dims * query.stride_d, row_mask, dims < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    planes = sequence.query_batch * heads + head
    rows = Rows(signed(query_tile, rule), queries, positions, planes)
    first_key = split * split_keys
    output_tile, row_logsumexp = attend_to_all(
        rows,
        tokens_of(key, kv_head, sequence, sequences, ALIGNMENT, HEAD_DIM, BLOCK_N, BLOCK_D, ADDRESSES),
        tokens_of(value, kv_head, sequence, sequences, ALIGNMENT, VALUE_DIM, BLOCK_N, BLOCK_DV, ADDRESSES),
        0, sequence.queries - 1, first_key, tl.minimum(sequence.keys, first_key + split_keys), rule,
        scoring_of(rule, sequence.number, head, band_of(rule, sequence.queries, sequence.keys), MASK_ALIGNMENT),
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, ADDRESSES, PRECISION,
    )  # fmt: skip
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    first_row = split.to(tl.int64) * split_rows
    part = output + first_row * VALUE_DIM
    tl.store(
        token_pointers(part, sequence.query_batch, q_len, positions.to(tl.int64), heads, head, value_dims, VALUE_DIM),
        output_tile.to(output.dtype.element_ty),
        mask=row_mask & (value_dims < VALUE_DIM),
    )
    tl.store(logsumexp + first_row + planes * q_len + positions, row_logsumexp[:, None], mask=row_mask)


# Memory: 4 * (Dv + 1) bytes in for each row and split, Dv elements and 4 bytes out for each row.
@triton.jit(do_not_specialize=["heads", "q_len", "splits", "split_rows"])
def attention_merge_kernel(
    outputs: tl.tensor,  # [splits, B, H, T, Dv] float32, in memory (splits, B, T, H, Dv)
    logsumexps: tl.tensor,  # [splits, B, H, T] float32, contiguous
    output: tl.tensor,  # [B, H, T, Dv], in memory (B, T, H, Dv)
    logsumexp: tl.tensor,  # [B, H, T] float32, contiguous
    heads: tl.tensor,  # H
    q_len: tl.tensor,  # T
    splits: tl.tensor,
    split_rows: tl.tensor,  # B * H * T
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # at least as many as there are
) -> None:
    """One row's output: what the splits attended to, weighed with their shares of the softmax's denominator."""
    row = tl.program_id(0).to(tl.int64)  # in memory order (B, T, H)
    statistic = (row // heads // q_len * heads + row % heads) * q_len + row // heads % q_len
    split = tl.arange(0, BLOCK_SPLITS)
    exists = split < splits
    dims = tl.arange(0, BLOCK_DV)[None, :]
    parts = tl.load(logsumexps + split * split_rows.to(tl.int64) + statistic, mask=exists, other=float("-inf"))
    largest = tl.max(parts, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(parts - shift)
    total = tl.sum(weights, 0)
    is_empty = total == 0.0
    part_outputs = tl.load(
        outputs + (split[:, None] * split_rows.to(tl.int64) + row) * VALUE_DIM + dims,
        mask=exists[:, None] & (dims < VALUE_DIM),
        other=0.0,
    )
    merged = tl.sum(part_outputs * weights[:, None], 0) / tl.where(is_empty, 1.0, total)
    value_dims = tl.arange(0, BLOCK_DV)
    tl.store(output + row * VALUE_DIM + value_dims, merged.to(output.dtype.element_ty), mask=value_dims < VALUE_DIM)
    tl.store(logsumexp + statistic, tl.where(is_empty, float("-inf"), shift + tl.log(total)))


def splits_of(inputs: AttentionInputs, tiles: DecodeTiles) -> int:
    """How many programs share the keys of a sequence."""
    return max(-(-inputs.longest_key // tiles.split_keys), 1)


def attention_decode_parts(
    inputs: AttentionInputs, output: torch.Tensor, tiles: DecodeTiles
) -> tuple[torch.Tensor, ...]:
    """What programs that share the keys of `output` [B, H, T, Dv] write: outputs and logsumexps; none if none share."""
    splits = splits_of(inputs, tiles)
    if splits == 1:
        return ()
    batch, heads, q_len, value_dim = output.shape
    return (
        output.new_empty(splits, batch, q_len, heads, value_dim, dtype=torch.float32),
        output.new_empty(splits, batch, heads, q_len, dtype=torch.float32),
    )


def attention_decode_calls(
    inputs: AttentionInputs,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    tiles: DecodeTiles,
) -> tuple[Call, ...]:
    """The launches that fill `output` [B, H, T, Dv] and `logsumexp` [B, H, T] (float32, natural logarithm)."""
    _, heads, q_len, value_dim = output.shape
    splits, split_rows = splits_of(inputs, tiles), logsumexp.numel()
    parts = parts or (output, logsumexp)
    decode = Call(
        kernel=attention_decode_kernel,
        grid=(inputs.sequences * inputs.key.shape[1] * splits,),
        arguments={
            **inputs.arguments(tiles.attention),
            "output": parts[0],
            "logsumexp": parts[1],
            "splits": splits,
            "split_keys": tiles.split_keys,
            "split_rows": split_rows,
            "ADDRESSES": key_addresses(
                tiles.attention, inputs.key, inputs.value, inputs.options.block_table is not None
            ),
        },
        options={"num_warps": tiles.attention.num_warps, "num_stages": tiles.attention.num_stages},
    )
    if splits == 1:
        return (decode,)
    merge = Call(
        kernel=attention_merge_kernel,
        grid=(split_rows,),
        arguments={
            "outputs": parts[0],
            "logsumexps": parts[1],
            "output": output,
            "logsumexp": logsumexp,
            "heads": heads,
            "q_len": q_len,
            "splits": splits,
            "split_rows": split_rows,
            "VALUE_DIM": value_dim,
            "BLOCK_DV": padded(value_dim),
            "BLOCK_SPLITS": MOST_SPLITS,
        },
        options={"num_warps": 4},
    )
    return decode, merge
