"""Tell a user how training goes: a live bar where rich is installed and the output is a terminal, else plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from .train import Step

LINES = 20  # about as many plain lines as a run prints, besides those with a validation loss


@contextmanager
def progress(max_steps: int, steps_done: int = 0, file: TextIO | None = None) -> Iterator[Callable[[Step], None]]:
    """A function to call with every `Step`, for as long as the `with` block runs; prints to `file`, or to stderr."""
    file = file or sys.stderr
    try:
        import rich.console
        import rich.progress
    except ImportError:
        yield _plain_lines(max_steps, file)
        return
    console = rich.console.Console(file=file, highlight=False)
    if not console.is_terminal:
        yield _plain_lines(max_steps, file)
        return
    with rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        "{task.completed}/{task.total}",
        rich.progress.TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("training", total=max_steps, completed=steps_done)

        def on_step(step: Step) -> None:
            bar.update(task, completed=step.number, description=_rates(step))
            if step.validation_loss is not None:
                bar.console.print(describe(step))

        yield on_step


def describe(step: Step) -> str:
    """One line about `step`."""
    validation = "" if step.validation_loss is None else f", validation loss {step.validation_loss:.4f}"
    return f"step {step.number}: {_rates(step)}{validation}"


def _rates(step: Step) -> str:
    return f"loss {step.loss:.4f}, {step.tokens / step.seconds:,.0f} tokens/s"


def _plain_lines(max_steps: int, file: TextIO) -> Callable[[Step], None]:
    every = max(1, max_steps // LINES)

    def on_step(step: Step) -> None:
        if step.number % every == 0 or step.validation_loss is not None or step.number == max_steps:
            print(describe(step), file=file, flush=True)

    return on_step
