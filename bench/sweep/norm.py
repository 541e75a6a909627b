"""The cells of norms: every number of rows and every width."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import layer_norm, rms_norm

from ..cases import DIRECTIONS, Direction
from .direction import Run, runs

MOST_ELEMENTS = 2**26
KINDS = ("layer_norm", "rms_norm")
ROWS = (1, 8, 64, 512, 4096, 65536)
WIDTHS = (1, 2, 7, 16, 32, 64, 100, 256, 768, 1600, 4096, 12288, 65537)


@dataclass(frozen=True)
class NormCell:
    """A norm of N rows of C elements, with a weight, and with a bias where its kind has one."""

    kind: str
    N: int
    C: int
    dtype: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.kind:10} {self.N}x{self.C} {self.dtype} {self.direction}"

    def sides(self, by_kernel: bool) -> tuple[Run, Run]:
        """PyTorch's call and ours."""
        stream, grad_output = torch.randn(2, self.N, self.C, dtype=getattr(torch, self.dtype)).unbind()
        weight, bias = torch.randn(2, self.C, dtype=stream.dtype).unbind()
        parameters = [weight, bias] if self.kind == "layer_norm" else [weight]
        inputs = [tensor.detach().requires_grad_(self.direction != "forward") for tensor in (stream, *parameters)]
        norms = _pytorchs(self.kind), _trilbys(self.kind, by_kernel)
        return runs(norms, inputs, None if self.direction == "forward" else grad_output)


def _pytorchs(kind: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(F, kind)
    return lambda stream, *parameters: function(stream, stream.shape[-1:], *parameters)


def _trilbys(kind: str, by_kernel: bool) -> Callable[..., Tensor]:
    is_centered = kind == "layer_norm"
    if by_kernel:
        eps = 1e-5 if is_centered else torch.finfo(torch.float32).eps  # PyTorch's own
        return lambda stream, weight, bias=None: torch.ops.trilby.norm(stream, weight, bias, 1, is_centered, eps)[0]
    function: Callable[..., Tensor] = layer_norm if is_centered else rms_norm
    return lambda stream, *parameters: function(stream, stream.shape[-1:], *parameters)


def norm_cells(kinds: Sequence[str], dtypes: Sequence[str]) -> Iterator[NormCell]:
    """All cells of these kinds and dtypes that are not too large to be timed in passing."""
    for kind, dtype, N, C in product(kinds, dtypes, ROWS, WIDTHS):
        if N * C <= MOST_ELEMENTS:
            for direction in DIRECTIONS:
                yield NormCell(kind, N, C, dtype, direction)
