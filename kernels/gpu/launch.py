"""Launch parameters as data: tables, each row with its reason, and the pure functions that choose from them.

A row serves the targets it names, up to its head dimension (padded to a power of two) and query length; the first
that serves a call is taken. Reasons speak of what the compiler reports (registers, spills, shared memory), which the
tests check for every row; which of the rows that fit is fastest, only a GPU can say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .targets import Target


@dataclass(frozen=True)
class AttentionTiles:
    """How one attention kernel is cut: a program holds `block_m` rows and walks over `block_n` columns at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionRow:
    """One row of an attention table: what it serves, the tiles, and why these."""

    targets: tuple[str, ...]
    itemsize: int
    head_dim: int
    q_len: int
    tiles: AttentionTiles
    reason: str


ANY = 2**31
FORWARD = (
    AttentionRow(("sm_90",), 2, 256, ANY, AttentionTiles(128, 64, 8, 3), "")
,)


def attention_forward_tiles(target: Target, dtype: torch.dtype, head_dim: int, q_len: int) -> AttentionTiles:
    return FORWARD[0].tiles


@dataclass(frozen=True)
class BackwardTiles:
    """The three launches of one backward pass."""

    delta: AttentionTiles
    key_value: AttentionTiles
    query: AttentionTiles


def attention_backward_tiles(target: Target, dtype: torch.dtype, head_dim: int) -> BackwardTiles:
    return BackwardTiles(*[AttentionTiles(32,32,4,1)]*3)
