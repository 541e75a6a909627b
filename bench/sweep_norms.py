"""`python -m trilby.bench.sweep_norms`: norms of every size against PyTorch, to find where trilby is the slower.

Cells are cheap, a few dozen milliseconds each, and so a little noisy: one that looks lost is timed again, for longer,
before it is printed. `--kernel` times trilby's kernel even where the rule (kernels/norm.py) leaves the call to PyTorch:
what the rule's limits should be.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import keep_memory, layer_norm, rms_norm

from .cases import DIRECTIONS, Direction
from .measure import Budget, HostTimer, interleaved, paired_ratios, quantile

LOST = 0.95  # PyTorch's time over ours, below which a cell is lost
MOST_ELEMENTS = 2**26
BUDGETS = (Budget(seconds=0.01, most_rounds=9, sample_seconds=3e-4), Budget(0.1, 11, 41, 1e-3))
OPERATIONS = ("layer_norm", "rms_norm")
ROWS = (1, 8, 64, 512, 4096, 65536)
WIDTHS = (1, 2, 7, 16, 32, 64, 100, 256, 768, 1600, 4096, 12288, 65537)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cell:
    """A norm of N rows of C elements, with a weight, and with a bias where the operation has one."""

    operation: str
    N: int
    C: int
    dtype: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.operation:10} {self.N}x{self.C} {self.dtype} {self.direction}"

    def sides(self, by_kernel: bool) -> tuple[Callable[[], object], Callable[[], object]]:
        """PyTorch's call and ours."""
        stream, grad_output = torch.randn(2, self.N, self.C, dtype=getattr(torch, self.dtype)).unbind()
        weight, bias = torch.randn(2, self.C, dtype=stream.dtype).unbind()
        parameters = [weight, bias] if self.operation == "layer_norm" else [weight]
        inputs = [tensor.detach().requires_grad_(self.direction != "forward") for tensor in (stream, *parameters)]
        norms = (_pytorchs(self.operation), _trilbys(self.operation, by_kernel))
        if self.direction == "forward":
            return partial(norms[0], *inputs), partial(norms[1], *inputs)
        pytorch, trilby = (partial(_forward_and_backward, norm, inputs, grad_output) for norm in norms)
        return pytorch, trilby


def _pytorchs(operation: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(F, operation)
    return lambda stream, *parameters: function(stream, stream.shape[-1:], *parameters)


def _trilbys(operation: str, by_kernel: bool) -> Callable[..., Tensor]:
    is_centered = operation == "layer_norm"
    if by_kernel:
        eps = 1e-5 if is_centered else torch.finfo(torch.float32).eps  # PyTorch's own
        return lambda stream, weight, bias=None: torch.ops.trilby.norm(stream, weight, bias, 1, is_centered, eps)[0]
    function: Callable[..., Tensor] = layer_norm if is_centered else rms_norm
    return lambda stream, *parameters: function(stream, stream.shape[-1:], *parameters)


def _forward_and_backward(norm: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> object:
    return torch.autograd.grad(norm(*inputs), inputs, grad_output)


def cells(operations: Sequence[str], dtypes: Sequence[str]) -> Iterator[Cell]:
    """All cells of these operations and dtypes that are not too large to be timed in passing."""
    for operation, dtype, N, C in product(operations, dtypes, ROWS, WIDTHS):
        if N * C <= MOST_ELEMENTS:
            for direction in DIRECTIONS:
                yield Cell(operation, N, C, dtype, direction)


def ratio(cell: Cell, by_kernel: bool, timer: HostTimer) -> float:
    """PyTorch's time over ours: of a quick look, or if that is a loss, of a longer one."""
    pytorch, trilby = cell.sides(by_kernel)
    found = 0.0
    for budget in BUDGETS:
        seconds = interleaved({"PyTorch": pytorch, "trilby": trilby}, budget, timer)
        found = quantile(paired_ratios(seconds["PyTorch"], seconds["trilby"]), 0.5)
        if found >= LOST:
            break
    return found


def main(arguments: Sequence[str]) -> int:
    """Time all cells and print those that are lost; 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.sweep_norms", description=__doc__)
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="all by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="all by default")
    parser.add_argument("--kernel", action="store_true", help="trilby's kernel where the rule takes PyTorch's, too")
    parser.add_argument("--all", action="store_true", help="print every cell")
    parser.add_argument("--one-thread", action="store_true", help="on one thread, by its own time: for busy machines")
    options = parser.parse_args(arguments)
    if options.one_thread:
        torch.set_num_threads(1)
    keep_memory()
    timer = HostTimer(time.thread_time if options.one_thread else time.perf_counter)
    torch.manual_seed(0)
    lost = total = 0
    for cell in cells(options.operation or OPERATIONS, options.dtype or DTYPES):
        found = ratio(cell, options.kernel, timer)
        total += 1
        lost += found < LOST
        if options.all or found < LOST:
            print(f"{found:6.2f}  {cell}", flush=True)
    print(f"{lost} of {total} cells are lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
