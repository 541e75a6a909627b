"""`python -m trilby.bench.step`: whole training steps of GPT-2, in turns, and where their time goes.

The reference GPT on trilby's layers and with `keep_memory()`, as `python -m trilby.gpt train` runs it; against it the
same model on PyTorch's functions, as nanoGPT writes it, and with its blocks compiled; and Hugging Face's, where
transformers is installed. Each is in a process of its own, its weights drawn anew. A step is forward, backward,
clipping and a fused AdamW. Memory is the most that a process had beyond the libraries it loaded: weights, gradients,
the optimizer's and what a step keeps. Shares are the profiler's, of the operators' own time on one step after the
others; page faults are in whatever touched the page.

At the size of GPT-2 a step takes seconds on two threads, so this is no part of `make bench`. Without a lesson being
asked for all of `LESSONS` are given, which takes two threads a quarter of an hour; `--lesson 3` gives one of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from trilby.gpt import PRESETS

from .learner import COMPILED, HUGGING_FACE, Learner, Lesson, Told
from .measure import quantiles
from .models import has_transformers
from .results import OURS, RIVAL

LESSONS = (
    *(Lesson(1, 1024, dropout, precision) for dropout in (0.1, 0.0) for precision in ("float32", "bfloat16")),
    *(Lesson(4, 256, dropout, precision) for dropout in (0.1, 0.0) for precision in ("float32", "bfloat16")),
    Lesson(4, 1024, 0.0, "float32"),
)
EVERYONE = (OURS, RIVAL, COMPILED, HUGGING_FACE)


@dataclass(frozen=True)
class Outcome:
    """How a lesson went for each contestant."""

    lesson: Lesson
    seconds: dict[str, list[float]]  # of each step after the first
    peaks: dict[str, int | None]

    def ratio(self, name: str) -> float:
        """Another's time over ours: the median of the turns."""
        return quantiles([other / mine for other, mine in zip(self.seconds[name], self.seconds[OURS])]).p50

    def rate(self, name: str) -> float:
        """Tokens a second."""
        return self.lesson.tokens / quantiles(self.seconds[name]).p50

    def lines(self) -> list[str]:
        """One for each contestant."""
        found = []
        for name in self.seconds:
            peak = self.peaks[name]
            ratio = f", {self.ratio(name):.2f} of trilby's time" if name != OURS and OURS in self.seconds else ""
            memory = "" if peak is None else f", {peak / 1e9:.2f} GB"
            found.append(f"{name}: {self.rate(name):.0f} tokens/s{ratio}{memory}")
        return found

    def row(self) -> str:
        """A row of the table at the end: ours against the fastest other, and against the one of least memory."""
        others = [name for name in self.seconds if name != OURS]
        best = min(others, key=self.ratio)
        peaks = [peak for name in others if (peak := self.peaks[name])]
        ours = self.peaks[OURS]
        memory = f"{1 - ours / min(peaks):.0%} less" if ours and peaks else ""
        rates = f"{self.rate(OURS):.0f} | {self.rate(best):.0f} | {best} | {self.ratio(best):.2f}"
        return f"| {self.lesson} | {rates} | {memory} |"


def main(arguments: Sequence[str]) -> int:
    """Print tokens a second, memory and shares of each contestant, as they come; and a table of all lessons."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.step", description=__doc__)
    numbers = ", ".join(f"{number}: {lesson}" for number, lesson in enumerate(LESSONS, 1))
    parser.add_argument("--lesson", type=int, nargs="*", choices=range(1, len(LESSONS) + 1), metavar="N", help=numbers)
    parser.add_argument("--batch-size", type=int, metavar="B", help="a lesson of your own; default: 4")
    parser.add_argument("--length", type=int, metavar="T", help="of your own; default: 256")
    parser.add_argument("--dropout", type=float, metavar="P", help="of your own; default: 0")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of your own; default: float32")
    parser.add_argument("--size", choices=sorted(PRESETS), default="gpt2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="in turns; default: %(default)s")
    parser.add_argument("--only", nargs="*", choices=EVERYONE, help="default: all that there are")
    parser.add_argument("--shares", action="store_true", help="say where a step's time goes, too")
    parser.add_argument("--keep-memory", action="store_true", help="for all, not for trilby alone")
    options = parser.parse_args(arguments)
    outcomes = [give(lesson, options) for lesson in _lessons(options)]
    if all(OURS in outcome.seconds and len(outcome.seconds) > 1 for outcome in outcomes):
        print("\n| lesson | trilby, tokens/s | the best other | which is | ratio | memory |\n|---|--:|--:|---|--:|--:|")
        print("\n".join(outcome.row() for outcome in outcomes))
    return 0


def _lessons(options: argparse.Namespace) -> list[Lesson]:
    own = {"batch_size": 4, "length": 256, "dropout": 0.0, "precision": "float32"}
    asked = {name: value for name in own if (value := getattr(options, name)) is not None}
    if asked:
        return [Lesson(**{**own, **asked}, size=options.size)]
    chosen = options.lesson or range(1, len(LESSONS) + 1)
    return [replace(LESSONS[number - 1], size=options.size) for number in chosen]


def give(lesson: Lesson, options: argparse.Namespace) -> Outcome:
    """Have all that take part learn it, in turns, and print how they do."""
    print(f"{lesson}, {torch.get_num_threads()} threads", flush=True)
    names = options.only or [name for name in EVERYONE if name != HUGGING_FACE or has_transformers()]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        learners = {}
        for name in names:
            told = Told(name, lesson, torch.get_num_threads(), name == OURS or options.keep_memory)
            learners[name] = stack.enter_context(Learner(told))
            first = learners[name].step()  # makes what stays, and is not counted
            print(f"{name}: the first step took {first:.1f} s", file=sys.stderr, flush=True)
        for _ in range(options.steps):
            for name, learner in learners.items():
                seconds[name].append(learner.step())
                print(f"{name}: a step took {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
        outcome = Outcome(lesson, seconds, {name: learner.peak() for name, learner in learners.items()})
        print("\n".join(outcome.lines()), flush=True)
        for name, learner in learners.items() if options.shares else ():
            shares = learner.shares().most_common()
            print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares), flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
