"""Launch parameters of attention as data: the pure functions that choose a row of a table.

The tables, each row with its reason, are attention_launch_forward.py and attention_launch_backward.py.

A row serves the targets it names, up to its head dimension and query length; the first row that serves a call is
taken. Reasons tell what the compiler reports, which the tests check for every row: nothing may spill where the row does
not say so, and shared memory must suffice. They speak of the largest tile of a family that fits, because the fewer
tiles, the fewer times keys and values are read; which of the tiles that fit is fastest, only a GPU can tell. For sm_90
in half precision one has told (H200, PyTorch 2.11, triton 3.6, 4096 tokens): two programs of 4 warps at once beat one
of 8 with larger tiles, and registers that spill outside of the main loop cost less than tiles too small for the
instructions that take 64 rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .attention_launch_backward import BACKWARD_KEY_VALUE, BACKWARD_QUERY, BACKWARD_ROWS
from .attention_launch_forward import DECODE, FORWARD, FORWARD_BY_DESCRIPTOR
from .attention_tiles import AttentionTiles, BackwardTiles, DecodeTiles, Row
from .measured import Place, measured_numbers
from .targets import Target

MOST_DECODED_QUERIES = 16
# As many as the merge holds at once; and fewer keys than this are over before a second kernel has started.
MOST_SPLITS = 64
FEWEST_SPLIT_KEYS = 256
TABLES = {"forward": FORWARD, "decode": DECODE, "key_value": BACKWARD_KEY_VALUE, "query": BACKWARD_QUERY}


def place_of(table: tuple[Row, ...], target: Target, row: Row) -> Place:
    """By what a row is known to `measured.py`."""
    name = next(name for name, each in TABLES.items() if each is table)
    return Place(name, target.name, row.arithmetic, row.head_dim, row.q_len, row.scores)


def attention_forward_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, q_len: int, is_plain: bool = True
) -> AttentionTiles:
    """The forward's launch parameters: for a target, arithmetic and head dimension at most 3 as lengths go."""
    return _first(FORWARD, target, _arithmetic(dtype, precision), head_dim, q_len, is_plain)


def attention_forward_by_descriptor_tiles(
    target: Target, dtype: torch.dtype, head_dim: int, precision: str = "ieee"
) -> AttentionTiles | None:
    """The forward's other launch parameters, which load by tensor descriptors; None: there are none."""
    row = _first_row(FORWARD_BY_DESCRIPTOR, target, _arithmetic(dtype, precision), head_dim, 0, True)
    return None if row is None else row.tiles


def attention_decode_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, q_len: int, group: int, kv_len: int
) -> DecodeTiles | None:
    """The decode kernel's launch parameters; None: the forward's kernel is the better.

    Splits depend on the keys alone, so that a sequence is computed the same way whatever else is in the batch.
    """
    if q_len > MOST_DECODED_QUERIES:
        return None
    try:
        tiles = _first(DECODE, target, _arithmetic(dtype, precision), head_dim, q_len * group, False)
    except LookupError:
        return None
    keys = max(FEWEST_SPLIT_KEYS, -(-kv_len // MOST_SPLITS))
    return DecodeTiles(tiles, -(-keys // tiles.block_n) * tiles.block_n)


def attention_backward_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, is_plain: bool = True
) -> BackwardTiles:
    """The backward's launch parameters, which do not depend on lengths."""
    arithmetic = _arithmetic(dtype, precision)
    return BackwardTiles(
        BACKWARD_ROWS,
        _first(BACKWARD_KEY_VALUE, target, arithmetic, head_dim, 0, is_plain),
        _first(BACKWARD_QUERY, target, arithmetic, head_dim, 0, is_plain),
    )


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "half"


def _first(
    table: tuple[Row, ...], target: Target, arithmetic: str, head_dim: int, q_len: int, is_plain: bool
) -> AttentionTiles:
    row = _first_row(table, target, arithmetic, head_dim, q_len, is_plain)
    if row is None:
        raise LookupError(f"no row for {target.name}, {arithmetic}, head dimension {head_dim}")
    numbers = measured_numbers(place_of(table, target, row))
    return row.tiles if numbers is None else replace(row.tiles, **dict[str, Any](numbers))


def _first_row(
    table: tuple[Row, ...], target: Target, arithmetic: str, head_dim: int, q_len: int, is_plain: bool
) -> Row | None:
    scores = ("any", "plain" if is_plain else "rich")
    for row in table:
        serves = target.name in row.targets and arithmetic == row.arithmetic and row.scores in scores
        if serves and head_dim <= row.head_dim and q_len <= row.q_len:
            return row
    return None
