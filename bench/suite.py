"""Runs the cases: check a case, time it, make it a row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from trilby.gpt import PYTORCH

from .cases import (
    ALLOCATION_CASE,
    ATTENTION_CASES,
    DIRECTIONS,
    DTYPES,
    NORM_CASES,
    SELF_CHECKS,
    Case,
    Direction,
    NormCase,
    attention_flops,
    norm_bytes,
)
from .contestants import Call, contestants, errors, prepare, truths
from .machine import MIB, Ceilings
from .measure import Budget, interleaved
from .memory import peak_bytes
from .results import COMPILED, RIVAL, RIVAL_AGAIN, Row, Work

# What `--cold` writes between turns: more than any cache holds, so that no turn finds its inputs there.
EVICTION_BYTES = 512 * MIB


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        only: "attention", "norm", "gpt" or "models"; none: all.
        quick: Few cases, few rounds, a small GPT.
        cold: Evict the caches before every turn.
        compiled: Let PyTorch's functions through torch.compile take turns too.
    """

    only: str | None = None
    quick: bool = False
    cold: bool = False
    compiled: bool = False

    def includes(self, group: str) -> bool:
        """Whether `group` is run."""
        return self.only in (None, group)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The attention and norm cases that are run."""
        attention = ATTENTION_CASES if self.includes("attention") else ()
        norm = NORM_CASES if self.includes("norm") else ()
        return tuple(case for case in (*attention, *norm) if case.quick or not self.quick)

    @property
    def kernel_steps(self) -> int:
        """How many rows `allocator_row` and `kernel_rows` make."""
        return len(SELF_CHECKS) + len(self.cases) * len(DTYPES) * len(DIRECTIONS) + self.shows_allocator

    @property
    def shows_allocator(self) -> bool:
        """Whether one case is shown with the C allocator as it comes, too."""
        return self.includes("norm") and not self.quick

    def budget(self) -> Budget:
        """The time that one row may take."""
        before = _evict if self.cold else None
        if self.quick:
            return Budget(seconds=0.1, most_rounds=50, before=before)
        return Budget(seconds=0.6, before=before)


def allocator_row(plan: Plan, ceilings: Ceilings) -> Row:
    """One case with the C allocator as it comes; `keep_memory()`, which holds from then on, has not been called yet."""
    job = prepare(ALLOCATION_CASE, torch.float32)
    calls = {name: job.call(layers, "forward") for name, layers in contestants(compiled=False).items()}
    row = _timed_row(ALLOCATION_CASE, "forward", "float32", calls, plan, ceilings)
    return replace(row, setting="without keep_memory()")


def kernel_rows(plan: Plan, ceilings: Ceilings, advance: Callable[[], None]) -> Iterator[Row]:
    """A row for every case, dtype and direction, PyTorch against itself in between; `advance` is called after each."""
    checks = list(SELF_CHECKS)
    pause = max(len(plan.cases) // len(checks), 1)
    for number, case in enumerate(plan.cases):
        if number % pause == 0 and checks:  # spread over the run, since noise comes and goes
            yield _self_check_row(*checks.pop(0), plan, ceilings)
            advance()
        for dtype in DTYPES:
            job = prepare(case, getattr(torch, dtype))
            truth = truths(job)
            sides = contestants(plan.compiled)
            for direction in DIRECTIONS:
                calls = {name: job.call(layers, direction) for name, layers in sides.items()}
                if COMPILED in calls:
                    calls[COMPILED]()  # compiles; neither that time nor that memory is a call's
                # First, while nothing is warm: later calls find scratch memory that they need not ask for.
                checked = {name: peak_bytes(call) for name, call in calls.items()}
                found = errors(job, {name: result for name, (result, _) in checked.items()}, truth)
                row = _timed_row(case, direction, dtype, calls, plan, ceilings)
                peaks = {name: peak for name, (_, peak) in checked.items()}
                yield replace(row, errors=tuple(found), peak_bytes=peaks)
                advance()
    for check in checks:
        yield _self_check_row(*check, plan, ceilings)
        advance()


def work_of(case: Case, direction: Direction, dtype: str, ceilings: Ceilings) -> Work:
    """What a call must do, beside the ceiling that holds for it."""
    if isinstance(case, NormCase):
        moved = norm_bytes(case, direction, getattr(torch, dtype).itemsize)
        return Work(moved, "byte", ceilings.bandwidth(moved))
    return Work(attention_flops(case.B, case.H, case.T, case.D, direction), "flop", ceilings.flops[dtype])


def _self_check_row(case: Case, direction: Direction, plan: Plan, ceilings: Ceilings) -> Row:
    job = prepare(case, torch.float32)
    calls = {name: job.call(PYTORCH, direction) for name in (RIVAL, RIVAL_AGAIN)}
    row = _timed_row(case, direction, "float32", calls, plan, ceilings)
    return replace(row, ours=RIVAL_AGAIN)


def _timed_row(
    case: Case, direction: Direction, dtype: str, calls: dict[str, Call], plan: Plan, ceilings: Ceilings
) -> Row:
    return Row(
        operation=case.operation,
        shape=case.shape,
        dtype=dtype,
        direction=direction,
        why=case.why,
        seconds=interleaved(calls, plan.budget()),
        work=work_of(case, direction, dtype, ceilings),
    )


def _evict() -> None:
    torch.empty(EVICTION_BYTES, dtype=torch.uint8).fill_(1)
