from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionTiles:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
