"""Keys in blocks, as a cache that grows holds them: the same call with its keys in a row, and in blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from trilby.kernels.options import AttentionOptions

Attention = Callable[..., tuple[Tensor, Tensor]]  # of query, key, value and the options: output and logsumexp


@dataclass(frozen=True)
class Cache:
    """Sequences of `lengths` keys, at most S of them, that T queries each end with; what no sequence has is NaN."""

    lengths: tuple[int, ...]
    H: int
    Hkv: int
    T: int
    S: int
    D: int
    window_left: int

    def assert_blocks_change_nothing(self, attention: Attention, size: int, packed: bool) -> None:
        """`attention` gives the same bits of keys in a row and of the same keys in blocks of `size`, out of order."""
        N, lengths = len(self.lengths), torch.tensor(self.lengths, dtype=torch.int32)
        query = torch.randn(N, self.H, self.T, self.D)
        key, value = (torch.randn(N, self.Hkv, self.S, self.D) for _ in range(2))
        table = torch.randperm(N * -(-self.S // size)).view(N, -1)
        exists = (torch.arange(self.S) < lengths[:, None])[:, None, :, None]
        blocks = [_in_blocks(rows.masked_fill(~exists, torch.nan), table, size) for rows in (key, value)]
        options = AttentionOptions(
            key_lengths=lengths, scale=0.25, lower_right=True, window_left=self.window_left, window_right=0
        )
        expected = attention(query, key, value, *options)
        if packed:
            query, *expected = (_packed(rows) for rows in (query, *expected))
            starts = torch.arange(N + 1, dtype=torch.int32) * self.T
            options = options._replace(query_starts=starts, longest_query=self.T)
        results = attention(query, *blocks, *options._replace(block_table=table.int()))
        for name, mine, same in zip(("output", "logsumexp"), results, expected):
            assert torch.equal(mine, same), name


def _in_blocks(rows: Tensor, table: Tensor, size: int) -> Tensor:
    """[blocks, Hkv, size, D] of [N, Hkv, S, D], each block where the table [N, blocks of a sequence] says."""
    Hkv, S, D = rows.shape[1:]
    padded = F.pad(rows, (0, 0, 0, table.shape[1] * size - S), value=torch.nan)
    blocks = torch.empty(table.numel(), Hkv, size, D)
    blocks[table.flatten()] = padded.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    return blocks


def _packed(rows: Tensor) -> Tensor:
    """[1, H, N · T, …] of [N, H, T, …]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]
