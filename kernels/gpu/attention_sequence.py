"""Which queries and keys a program has to do with: sequences packed one after another, of given lengths, in pages."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .attention_score import GUARD_BLOCK, Band, Rule
from .tile import Head, Heads, head_of, load_tile, load_tokens, stride_of


class Pages(NamedTuple):
    """The block table [N, pages of a sequence] int32: page p of sequence n is at index table[n, p] of key and value."""

    pointer: tl.tensor
    stride_n: tl.tensor
    stride_page: tl.tensor
    size: tl.tensor  # keys a page


class Sequences(NamedTuple):
    """Where sequences lie in the rows of query and key; all None: one to each index of the batch, of all its rows."""

    query_starts: tl.tensor | None  # [N + 1] int32: sequence n has the rows starts[n] ... starts[n + 1] - 1 of batch 0
    key_starts: tl.tensor | None  # [N + 1] int32
    key_lengths: tl.tensor | None  # [B or N] int32: only so many keys of a sequence exist
    pages: Pages | None


class Sequence(NamedTuple):
    """One of them."""

    number: tl.tensor
    query_batch: tl.tensor  # 64 bits: the index of query's batch
    first_query: tl.tensor  # its first row there
    queries: tl.tensor  # T
    key_batch: tl.tensor
    first_key: tl.tensor
    key_rows: tl.tensor  # S
    keys: tl.tensor  # those of the S that exist


@triton.jit
def sequence_of(sequences: Sequences, number: tl.tensor, q_len: tl.tensor, kv_len: tl.tensor) -> Sequence:
    """Sequence `number`, of q_len and kv_len rows if they are not packed."""
    query_batch = number.to(tl.int64)
    key_batch = query_batch
    first_query = number * 0
    first_key = first_query
    queries = q_len
    key_rows = kv_len
    if sequences.query_starts is not None:
        query_batch = query_batch * 0
        first_query = tl.load(sequences.query_starts + number)
        queries = tl.load(sequences.query_starts + number + 1) - first_query
    if sequences.key_starts is not None:
        key_batch = key_batch * 0
        first_key = tl.load(sequences.key_starts + number)
        key_rows = tl.load(sequences.key_starts + number + 1) - first_key
    keys = key_rows
    if sequences.key_lengths is not None:
        keys = tl.minimum(keys, tl.load(sequences.key_lengths + number))
    return Sequence(number, query_batch, first_query, queries, key_batch, first_key, key_rows, keys)


@triton.jit
def sequence_of_slot(
    starts: tl.tensor, count: tl.tensor, slot: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The sequence that tile number `slot` of packed rows belongs to, and the tile's number in it.

    Sequence n takes the slots from starts[n] // BLOCK + n on, which is enough for its rows wherever they begin: slots
    are known from the sizes of the tensors alone. A tile past the end of its sequence has nothing to do.
    """
    low = slot * 0
    high = count
    while low + 1 < high:  # low <= sequence < high
        middle = (low + high) // 2
        is_right = slot >= tl.load(starts + middle) // BLOCK + middle
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    return low, slot - (tl.load(starts + low) // BLOCK + low)


class Tokens(NamedTuple):
    """One head of the keys or values of a sequence."""

    head: Head  # paged: page 0 of the cache
    descriptor: tl.tensor_descriptor  # of the keys that exist, in tiles of so many, if addresses are "descriptors"
    stride_page: tl.tensor  # elements from one page to the next, if they are "pages"
    table: tl.tensor  # the pages of the sequence
    table_stride: tl.tensor
    page_size: tl.tensor


@triton.jit
def tokens_of(
    heads: Heads,
    head: tl.tensor,
    sequence: Sequence,
    sequences: Sequences,
    ALIGNMENT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `attention_forward.key_addresses`
) -> Tokens:
    """The keys or values of a head of a sequence, from the first on."""
    descriptor = 0
    stride_page = 0
    table = 0
    table_stride = 0
    page_size = 0
    batch = sequence.key_batch
    if sequences.pages is not None:
        pages = sequences.pages
        batch = batch * 0
        stride_page = stride_of(heads.stride_b, ALIGNMENT)
        table = pages.pointer + sequence.number * stride_of(pages.stride_n, 1)
        table_stride = pages.stride_page
        page_size = pages.size
    tokens = head_of(heads, batch, head, sequence.first_key, ALIGNMENT)
    if ADDRESSES == "descriptors":
        descriptor = tl.make_tensor_descriptor(
            tokens.pointer, [sequence.keys, DIM], [tokens.stride_t, 1], [BLOCK, BLOCK_DIM]
        )
    return Tokens(tokens, descriptor, stride_page, table, table_stride, page_size)


@triton.jit
def load_keys(
    tokens: Tokens,
    first: tl.tensor,
    low: tl.tensor,
    end: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    ADDRESSES: tl.constexpr,  # `attention_forward.key_addresses`
) -> tl.tensor:
    """Keys or values first ... first + BLOCK - 1; every one by its page if paged.

    By descriptor, what lies past the last key is 0, and what a window or causality hides is read as any other: results
    that it makes NaN are computed again, from tiles that no descriptor is for (`attention_score.weigh`).
    """
    if ADDRESSES == "descriptors" and BLOCK != GUARD_BLOCK:
        tile = tokens.descriptor.load([first, 0])
    elif ADDRESSES != "pages":
        tile = load_tokens(tokens.head, first, low, end, DIM, BLOCK, BLOCK_DIM, MASKED, ADDRESSES)
    else:
        numbers = first + tl.arange(0, BLOCK)[:, None]
        dims = tl.arange(0, BLOCK_DIM)[None, :]
        row_mask = (numbers >= low) & (numbers < end)
        page_pointers = tokens.table + numbers // tokens.page_size * tokens.table_stride
        pages = tl.load(page_pointers, mask=row_mask, other=0).to(tl.int64)
        pointers = tokens.head.pointer + pages * tokens.stride_page
        pointers += numbers % tokens.page_size * tokens.head.stride_t + dims * tokens.head.stride_d
        tile = load_tile(pointers, row_mask, dims < DIM, MASKED, BLOCK_DIM != DIM)
    return tile


class Stages(NamedTuple):
    """A walk in tiles: masked from first, without masks from full_first, masked from full_end to end."""

    low: tl.tensor  # the first key or query that counts
    first: tl.tensor  # where its tile begins
    full_first: tl.tensor
    full_end: tl.tensor
    end: tl.tensor  # of what counts


@triton.jit
def key_stages(
    first_query: tl.tensor,
    last_query: tl.tensor,
    first_key: tl.tensor,  # a multiple of BLOCK_N
    end_key: tl.tensor,
    rule: Rule,
    band: Band,
    BLOCK_N: tl.constexpr,
) -> Stages:
    """Of the keys first_key <= j < end_key those that queries first_query ... last_query see.

    The outer tiles are masked. In tiles of 3::

        query 3   1 1 1 1 1 1 1 0 0
              4   0 1 1 1 1 1 1 1 0
              5   0 0 1 1 1 1 1 1 1
                  masked|full |masked
    """
    low = first_key
    full_low = first_key
    end = end_key
    full_end = end_key
    if rule.window_right is not None:
        end = tl.minimum(end, tl.maximum(last_query + band.last + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first_query + band.last + 1, 0))
    if rule.window_left is not None:
        low = tl.maximum(first_query + band.first, first_key)
        full_low = tl.maximum(last_query + band.first, first_key)
    stages: Stages = in_tiles(low, full_low, full_end, end, rule.window_left is not None, BLOCK_N)
    return stages


@triton.jit
def query_stages(
    first_key: tl.tensor, last_key: tl.tensor, end_query: tl.tensor, rule: Rule, band: Band, BLOCK_M: tl.constexpr
) -> Stages:
    """Of the queries i < end_query those that see keys first_key ... last_key, in the same way.

    A tile of keys of which some do not exist is masked for all queries.
    """
    low = 0
    full_low = 0
    end = end_query
    full_end = tl.where(last_key < band.keys, end_query, 0)
    last_key = tl.minimum(last_key, band.keys - 1)
    if rule.window_right is not None:
        low = tl.maximum(first_key - band.last, 0)
        full_low = tl.maximum(last_key - band.last, 0)
    if rule.window_left is not None:
        end = tl.minimum(end, tl.maximum(last_key - band.first + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first_key - band.first + 1, 0))
    stages: Stages = in_tiles(low, full_low, full_end, end, rule.window_right is not None, BLOCK_M)
    return stages


@triton.jit
def in_tiles(
    low: tl.tensor,
    full_low: tl.tensor,
    full_end: tl.tensor,
    end: tl.tensor,
    STARTS_MASKED: tl.constexpr,  # otherwise low, which is full_low, is where a tile begins
    BLOCK: tl.constexpr,
) -> Stages:
    """What counts from low to end, and is seen by all from full_low to full_end, cut where tiles begin."""
    first = low
    full_first = low
    if STARTS_MASKED:
        first = low // BLOCK * BLOCK
        full_first = tl.cdiv(full_low, BLOCK) * BLOCK
        full_first = tl.minimum(full_first, tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, first))
    return Stages(low, first, full_first, tl.maximum(full_end // BLOCK * BLOCK, full_first), end)
