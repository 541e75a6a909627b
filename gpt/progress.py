"""Tell a user how work goes: a live bar where rich is installed and the output is a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from .ceiling import Ceiling
from .train import Step

LINES = 20  # about as many plain lines as a run prints, besides those with a validation loss
RECENT = 50  # steps whose pace says how long the rest will take


@contextmanager
def progress(
    max_steps: int, steps_done: int = 0, ceiling: Ceiling | None = None, file: TextIO | None = None
) -> Iterator[Callable[[Step], None]]:
    """A function to call with every `Step`, for as long as the `with` block runs; prints to `file`, or to stderr."""
    file = file or sys.stderr
    bar = _bar(file, "{task.description}", "{task.completed}/{task.total}")
    if bar is None:
        yield _plain_lines(max_steps, ceiling, file)
        return
    with bar:
        task = bar.add_task("training", total=max_steps, completed=steps_done)

        def on_step(step: Step) -> None:
            bar.update(task, completed=step.number, description=_rates(step, ceiling))
            if step.validation_loss is not None:
                bar.console.print(describe(step, ceiling))

        yield on_step


@contextmanager
def byte_progress(what: str, file: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function to call with how many bytes of how many are done; as `progress` otherwise."""
    file = file or sys.stderr
    bar = _bar(file, what, "{task.completed:,}/{task.total:,} bytes")
    if bar is None:
        yield _plain_shares(what, file)
        return
    with bar:
        task = bar.add_task(what, total=0)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def describe(step: Step, ceiling: Ceiling | None = None) -> str:
    """One line about `step`."""
    validation = "" if step.validation_loss is None else f", validation loss {step.validation_loss:.4f}"
    return f"step {step.number}: {_rates(step, ceiling)}{validation}"


def _rates(step: Step, ceiling: Ceiling | None) -> str:
    share = "" if ceiling is None else f" ({ceiling.share(step.tokens, step.seconds):.0%} of the machine)"
    return f"loss {step.loss:.4f}, {step.tokens / step.seconds:,.0f} tokens/s{share}"


def _bar(file: TextIO, what: str, count: str) -> Any:
    """A bar that says `what` and `count`, None where there can be none."""
    try:
        import rich.console
        import rich.progress
    except ImportError:
        return None
    console = rich.console.Console(file=file, highlight=False)
    if not console.is_terminal:
        return None
    columns = (what, rich.progress.BarColumn(), count, rich.progress.TimeRemainingColumn())
    return rich.progress.Progress(*columns, console=console)


def _plain_lines(max_steps: int, ceiling: Ceiling | None, file: TextIO) -> Callable[[Step], None]:
    every = max(1, max_steps // LINES)
    ends = deque([time.monotonic()], maxlen=RECENT)  # of the last steps

    def on_step(step: Step) -> None:
        ends.append(time.monotonic())
        if step.number % every == 0 or step.validation_loss is not None or step.number == max_steps:
            pace = (ends[-1] - ends[0]) / (len(ends) - 1)
            left = f", {duration(pace * (max_steps - step.number))} left" if step.number < max_steps else ""
            print(describe(step, ceiling) + left, file=file, flush=True)

    return on_step


def _plain_shares(what: str, file: TextIO) -> Callable[[int, int], None]:
    shown = time.monotonic()

    def on_bytes(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{what}: {done / total:.0%} of {total:,} bytes", file=file, flush=True)

    return on_bytes


def duration(seconds: float) -> str:
    """As a user would say it: 0:07, 12:30, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
