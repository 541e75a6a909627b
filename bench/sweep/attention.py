"""The cells of attention: every corner of sizes, and masks, groups, views and dropout at the sizes of models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trilby.kernels import attend, scaled_dot_product_attention

from ..cases import DIRECTIONS, Direction
from .direction import Run, runs

MOST_MULTIPLICATIONS = 2**30  # of the scores of a cell: a tenth of a second in PyTorch
KINDS = ("causal", "full", "padding", "documents", "added", "grouped", "views", "dropout")
HEADS = ((1, 1), (1, 2), (1, 12), (4, 12))
LENGTHS = (4, 8, 16, 32, 64, 128, 256)
OTHER_LENGTHS = ((1, 16), (1, 128), (1, 1024), (1, 8192), (2, 256), (4, 1024), (8, 256), (16, 256), (64, 33))
WIDTHS = (16, 64, 256)


@dataclass(frozen=True)
class AttentionCell:
    """Attention of T queries to S keys, for B batches of H heads of D numbers."""

    kind: str
    B: int
    H: int
    T: int
    S: int
    D: int
    dtype: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.kind:9} {self.B}x{self.H}x{self.T}x{self.S}x{self.D} {self.dtype} {self.direction}"

    def sides(self, by_kernel: bool) -> tuple[Run, Run]:
        """PyTorch's call and ours."""
        inputs, options = self._inputs()
        ours: Callable[..., Any] = partial(scaled_dot_product_attention, **options)
        if by_kernel:
            ours = partial(attend, lower_right=False, **{k: v for k, v in options.items() if k != "enable_gqa"})
        calls = partial(F.scaled_dot_product_attention, **options), ours
        grad_output = None
        if self.direction != "forward":
            grad_output = torch.randn(self.B, self.T, self.H, self.D, dtype=inputs[0].dtype).transpose(1, 2)
        return runs(calls, inputs, grad_output)

    def _inputs(self) -> tuple[list[Tensor], dict[str, Any]]:
        B, H, T, S, D, dtype = self.B, self.H, self.T, self.S, self.D, getattr(torch, self.dtype)
        heads = H // 4 if self.kind == "grouped" else H
        if self.kind == "views":
            query, key, value = torch.randn(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
        else:
            query = torch.randn(B, H, T, D, dtype=dtype)
            key, value = torch.randn(2, B, heads, S, D, dtype=dtype).unbind()
        documents = torch.arange(T)[:, None] * 4 // T == torch.arange(S) * 4 // S
        options: dict[str, dict[str, Any]] = {
            "causal": {"is_causal": True},
            "views": {"is_causal": True},
            "full": {},
            "padding": {"attn_mask": (torch.arange(S) < S - S // 4).expand(B, 1, 1, S)},
            "documents": {"attn_mask": documents & torch.ones(T, S, dtype=torch.bool).tril(S - T)},
            "added": {"attn_mask": torch.randn(T, S)},
            "grouped": {"is_causal": True, "enable_gqa": True},
            "dropout": {"is_causal": True, "dropout_p": 0.1},
        }
        return [tensor.requires_grad_(self.direction != "forward") for tensor in (query, key, value)], options[
            self.kind
        ]


def attention_cells(kinds: Sequence[str], dtypes: Sequence[str]) -> Iterator[AttentionCell]:
    """All cells of these kinds and dtypes: of `causal` and `full` every size, of the others the sizes of models."""
    lengths = [(T, T) for T in LENGTHS] + list(OTHER_LENGTHS)
    for kind, dtype in product(kinds, dtypes):
        is_common = kind in ("causal", "full")
        for (B, H), (T, S), D in product(HEADS, lengths, WIDTHS):
            if not is_common and (H < 12 or D != 64 or (kind == "views" and T != S)):
                continue
            if (is_common and (kind == "full") == (T == S)) or B * H * T * S * D > MOST_MULTIPLICATIONS:
                continue  # other lengths are seen in full, a causal mask where they agree
            for direction in DIRECTIONS:
                yield AttentionCell(kind, B, H, T, S, D, dtype, direction)
