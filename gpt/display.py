"""Show text as it is generated.

Where rich is installed and the output is a terminal, the prompt stands out and the speed is told; anywhere else there
is the bare text, so that a pipe or a file holds nothing but what was written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO


def show(prompt: str, pieces: Iterable[str], file: TextIO | None = None) -> None:
    """Print `prompt`, and each of `pieces` as soon as it is there, to `file`, or to stdout."""
    file = file or sys.stdout
    try:
        from rich.console import Console

        console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    except ImportError:
        console = None
    if console is None or not console.is_terminal:
        print(prompt, end="", file=file, flush=True)
        for piece in pieces:
            print(piece, end="", file=file, flush=True)
        print(file=file)
        return
    watch = Stopwatch()
    console.print(prompt, end="", style="bold")
    for piece in watch.over(pieces):
        console.out(piece, end="", highlight=False)
    console.print()
    console.print(watch.describe(), style="dim")


class Stopwatch:
    """How long the first token took, which waits for the prompt to be read, and how fast the others came."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.moments: list[float] = []

    def over(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass `pieces` on, and note when each came."""
        for piece in pieces:
            self.moments.append(time.perf_counter())
            yield piece

    def describe(self) -> str:
        """One line."""
        if len(self.moments) < 3:  # the last piece is no token, but what was left of a character
            return ""
        first, last = self.moments[0], self.moments[-2]
        rate = (len(self.moments) - 2) / max(last - first, 1e-9)
        return (
            f"{len(self.moments) - 1} tokens, the first after {first - self.started:.2f} s, then {rate:,.0f} a second"
        )
