"""What attention is asked for, as the host knows it, and as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..options import AttentionOptions
from .attention_score import Rule, Slopes
from .attention_sequence import Pages, Sequences
from .attention_tiles import AttentionTiles
from .call import alignment_of, heads, padded, unspecialized

# Windows reach no farther: positions and windows then add up in 32 bits.
LARGEST_WINDOW = 2**30
DROPOUT_NUMBERS = 2**16


@dataclass(frozen=True)
class AttentionInputs:
    """What a call of attention reads.

    Attributes:
        query: [B, H, T, D].
        key: [B, Hkv, S, D], or [all blocks, Hkv, block size, D].
        value: Likewise, with Dv.
        options: All else.
        precision: How float32 matrices multiply, "ieee" or "tf32".
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: AttentionOptions
    precision: str = "ieee"

    @property
    def sequences(self) -> int:
        """How many there are: B, or N if they are packed."""
        starts = self.options.query_starts
        return self.query.shape[0] if starts is None else starts.shape[0] - 1

    @property
    def longest_query(self) -> int:
        """No sequence has more queries."""
        return self.query.shape[2] if self.options.query_starts is None else self.options.longest_query

    @property
    def longest_key(self) -> int:
        """No sequence has more keys."""
        table = self.options.block_table
        return self.key.shape[2] * (1 if table is None else table.shape[1])

    @property
    def group(self) -> int:
        """The query heads that share a key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def head_dim(self) -> int:
        """The larger of the two."""
        return max(self.query.shape[-1], self.value.shape[-1])

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a scale and a window is between products and probabilities, which saves registers."""
        options = self.options
        return options.mask is None and options.alibi_slopes is None and not options.softcap and not self.drops

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.options.seed is not None and self.options.dropout_p > 0

    @property
    def rule(self) -> Rule:
        """What is done to a score, as the kernels take it."""
        options, slopes = self.options, self.options.alibi_slopes
        threshold = round(options.dropout_p * DROPOUT_NUMBERS)
        return Rule(
            scale=float(options.scale),
            is_negative=1 if options.scale < 0 else None,
            softcap=float(options.softcap) if options.softcap else None,
            alibi_slopes=None if slopes is None else Slopes(slopes, *slopes.stride()),
            mask=None if options.mask is None else heads(options.mask),
            lower_right=1 if options.lower_right else None,
            window_left=None if options.window_left < 0 else min(options.window_left, LARGEST_WINDOW),
            window_right=None if options.window_right < 0 else min(options.window_right, LARGEST_WINDOW),
            seed=options.seed if self.drops else None,
            dropout_threshold=threshold if self.drops else None,
            dropout_scale=DROPOUT_NUMBERS / max(DROPOUT_NUMBERS - threshold, 1) if self.drops else None,
        )

    @property
    def packing(self) -> Sequences:
        """Where the sequences lie, as the kernels take it."""
        options, table = self.options, self.options.block_table
        pages = None
        if table is not None:
            pages = Pages(table, unspecialized(table.stride(0)), table.stride(1), self.key.shape[2])
        return Sequences(options.query_starts, options.key_starts, options.key_lengths, pages)

    def arguments(self, tiles: AttentionTiles) -> dict[str, Any]:
        """The arguments that every kernel over pairs of queries and keys has."""
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        mask = self.options.mask
        return {
            "query": heads(self.query),
            "key": heads(self.key),
            "value": heads(self.value),
            "sequences": self.packing,
            "rule": self.rule,
            "heads": self.query.shape[1],
            "group": self.group,
            "q_len": self.query.shape[2],
            "kv_len": self.longest_key,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ALIGNMENT": alignment_of(self.query, self.key, self.value),
            "MASK_ALIGNMENT": 1 if mask is None else alignment_of(mask),
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(value_dim),
            "PRECISION": self.precision,
        }
