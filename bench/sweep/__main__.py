"""`python -m trilby.bench.sweep`: attention and norms of every size against PyTorch, to find where trilby is slower.

Cells are cheap, a few dozen milliseconds each, and so a little noisy: one that looks lost is timed again, for longer,
before it is printed. `--kernel` times trilby's kernel even where a rule (kernels/attention_rules.py, kernels/norm.py)
leaves the call to PyTorch: what the rule's limits should be.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
from trilby.kernels import explain, keep_memory

from ..measure import Budget, HostTimer, interleaved, paired_ratios, quantile
from . import attention, norm
from .direction import Run

LOST = 0.95  # PyTorch's time over ours, below which a cell is lost
BUDGETS = (Budget(seconds=0.01, most_rounds=9, sample_seconds=3e-4), Budget(0.1, 11, 41, 1e-3))
KINDS = (*attention.KINDS, *norm.KINDS)
DTYPES = ("float32", "bfloat16", "float16")


class Cell(Protocol):
    """A call, whose text says which."""

    def sides(self, by_kernel: bool) -> tuple[Run, Run]:
        """PyTorch's call and ours."""


def cells(kinds: Sequence[str], dtypes: Sequence[str]) -> Iterator[Cell]:
    """All cells of these kinds and dtypes."""
    of_attention, of_norms = ([kind for kind in kinds if kind in known] for known in (attention.KINDS, norm.KINDS))
    return chain(attention.attention_cells(of_attention, dtypes), norm.norm_cells(of_norms, dtypes))


def ratio(cell: Cell, by_kernel: bool, timer: HostTimer) -> float:
    """PyTorch's time over ours: of a quick look, or if that is a loss, of a longer one."""
    pytorch, ours = cell.sides(by_kernel)
    found = 0.0
    for budget in BUDGETS:
        seconds = interleaved({"PyTorch": pytorch, "trilby": ours}, budget, timer)
        found = quantile(paired_ratios(seconds["PyTorch"], seconds["trilby"]), 0.5)
        if found >= LOST:
            break
    return found


def main(arguments: Sequence[str]) -> int:
    """Time all cells and print those that are lost; 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.sweep", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
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
    for cell in cells(options.kind or KINDS, options.dtype or DTYPES):
        found = ratio(cell, options.kernel, timer)
        total += 1
        lost += found < LOST
        if options.all or found < LOST:
            is_trilbys = options.kernel or explain(cell.sides(False)[1])[0].is_trilbys
            print(f"{found:6.2f}  {cell}, {'trilby' if is_trilbys else 'PyTorch'}'s kernel", flush=True)
    print(f"{lost} of {total} cells are lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
