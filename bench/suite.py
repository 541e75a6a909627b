"""Runs the cases: check a case, time it, make it a row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from .cases import (
    ALLOCATION_CASE,
    ATTENTION_CASES,
    GPU_ATTENTION_CASES,
    GPU_NORM_CASES,
    GPU_SELF_CHECKS,
    NORM_CASES,
    REPEAT_CASES,
    SELF_CHECKS,
    AttentionCase,
    Case,
    Device,
    Direction,
    NormCase,
    attention_work,
    norm_bytes,
    read_bytes,
)
from .contestants import Call, contestants, errors, prepare, truths
from .functions import PYTORCH, TRILBY
from .machine import MIB, Ceilings, timer_of
from .measure import Budget, differing_runs, interleaved
from .memory import device_peak_bytes, peak_bytes
from .results import COMPILED, OURS, RIVAL, RIVAL_AGAIN, Repeat, Row, Work

# What `--cold` writes between turns: more than any cache holds, so that no turn finds its inputs there.
EVICTION_BYTES = 512 * MIB
# Calls after which an allocator that keeps memory shows what it needs for all of them.
CALLS_FOR_PEAK = 3


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        only: "attention", "norm", "gpt" or "models"; none: all.
        quick: Few cases, few rounds, a small GPT.
        cold: Evict the caches before every turn.
        compiled: Let PyTorch's functions through torch.compile take turns too.
        device: Where: the cases are other ones. On a GPU caches are always evicted, in the time that a launch takes.
    """

    only: str | None = None
    quick: bool = False
    cold: bool = False
    compiled: bool = False
    device: Device = "cpu"

    def includes(self, group: str) -> bool:
        """Whether `group` is run."""
        return self.only in (None, group) and (group in ("attention", "norm") or self.device == "cpu")

    @property
    def cases(self) -> tuple[Case, ...]:
        """The attention and norm cases that are run."""
        on_cpu = self.device == "cpu"
        attention = ATTENTION_CASES if on_cpu else GPU_ATTENTION_CASES
        norm = NORM_CASES if on_cpu else GPU_NORM_CASES
        cases: tuple[Case, ...] = attention if self.includes("attention") else ()
        cases += norm if self.includes("norm") else ()
        return tuple(case for case in cases if case.quick or not self.quick)

    @property
    def self_checks(self) -> tuple[tuple[Case, Direction], ...]:
        """PyTorch against itself."""
        return SELF_CHECKS if self.device == "cpu" else GPU_SELF_CHECKS

    @property
    def repeat_cases(self) -> tuple[Case, ...]:
        """What is run again and again, to see whether the bits stay: on a GPU, where programs may race."""
        return () if self.device == "cpu" else REPEAT_CASES

    @property
    def repeats(self) -> int:
        """How often."""
        return 20 if self.quick else 250

    @property
    def kernel_steps(self) -> int:
        """How many rows `allocator_row`, `kernel_rows` and `repeat_rows` make."""
        rows = sum(len(case.dtypes) * len(case.directions) for case in self.cases)
        return len(self.self_checks) + rows + 2 * self.shows_allocator + len(self.repeat_cases)

    @property
    def shows_allocator(self) -> bool:
        """Whether one case is shown with the C allocator as it comes, and as `keep_memory()` sets it."""
        return self.includes("norm") and not self.quick and self.device == "cpu"

    def budget(self) -> Budget:
        """The time that one row may take."""
        if self.device == "cuda":
            return Budget(seconds=0.1 if self.quick else 0.4, most_rounds=100, before=_evict_device)
        before = _evict if self.cold else None
        if self.quick:
            return Budget(seconds=0.1, most_rounds=50, before=before)
        return Budget(seconds=0.45, before=before)


def allocator_row(plan: Plan, ceilings: Ceilings, setting: str) -> Row:
    """One case with the C allocator as it is set now, for both sides: time, and the peak memory of some calls."""
    job = prepare(ALLOCATION_CASE, torch.float32)
    calls = {name: job.call(layers, "forward") for name, layers in contestants(compiled=False).items()}
    peaks = {name: peak_bytes(partial(_repeated, call))[1] for name, call in calls.items()}
    row = _timed_row(ALLOCATION_CASE, "forward", "float32", calls, plan, ceilings)
    return replace(row, peak_bytes=peaks, setting=setting)


def _repeated(call: Call) -> None:
    """Calls as a program makes them, each freeing what the one before it returned."""
    for _ in range(CALLS_FOR_PEAK):
        call()


def kernel_rows(plan: Plan, ceilings: Ceilings, advance: Callable[[], None]) -> Iterator[Row]:
    """A row for every case, dtype and direction, PyTorch against itself in between; `advance` is called after each."""
    checks = list(plan.self_checks)
    pause = max(len(plan.cases) // len(checks), 1)
    for number, case in enumerate(plan.cases):
        if number % pause == 0 and checks:  # spread over the run, since noise comes and goes
            yield _self_check_row(*checks.pop(0), plan, ceilings)
            advance()
        for dtype in case.dtypes:
            job = prepare(case, getattr(torch, dtype))
            truth = truths(job)
            sides = contestants(plan.compiled, case)
            for direction in case.directions:
                calls, absent = available({name: job.call(layers, direction) for name, layers in sides.items()})
                if COMPILED in calls:
                    calls[COMPILED]()  # compiles; neither that time nor that memory is a call's
                # First, while nothing is warm: later calls find scratch memory that they need not ask for.
                measure_peak = peak_bytes if case.device == "cpu" else device_peak_bytes
                checked = {name: measure_peak(call) for name, call in calls.items()}
                found = errors(job, {name: result for name, (result, _) in checked.items()}, truth)
                row = _timed_row(case, direction, dtype, calls, plan, ceilings)
                peaks = {name: peak for name, (_, peak) in checked.items()}
                yield replace(row, errors=tuple(found), peak_bytes=peaks, absent=absent)
                advance()
    for check in checks:
        yield _self_check_row(*check, plan, ceilings)
        advance()


def available(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that can compute the case on this machine, and of the others why not; ours and PyTorch's must."""
    found, absent = {}, {}
    for name, call in calls.items():
        if name not in (RIVAL, OURS, COMPILED):
            try:
                call()
            except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError, ImportError) as error:
                absent[name] = (str(error).strip() or type(error).__name__).splitlines()[-1]
                continue
        found[name] = call
    return found, absent


def repeat_rows(plan: Plan, advance: Callable[[], None]) -> Iterator[Repeat]:
    """Each of the plan's awkward cases again and again; `advance` is called after each."""
    for case in plan.repeat_cases:
        call = prepare(case, torch.bfloat16).call(TRILBY, "forward+backward")
        yield Repeat(f"{case.operation} {case.shape}", plan.repeats, differing_runs(call, plan.repeats))
        advance()


def work_of(case: Case, direction: Direction, dtype: str, ceilings: Ceilings) -> Work:
    """What a call must do, beside the ceiling that holds for it."""
    if isinstance(case, NormCase):
        moved = norm_bytes(case, direction, getattr(torch, dtype).itemsize)
        return Work(moved, "byte", ceilings.bandwidth(moved))
    if isinstance(case, AttentionCase) and case.T == 1:
        read = read_bytes(case, getattr(torch, dtype).itemsize)
        return Work(read, "byte", ceilings.reading)
    return Work(attention_work(case, direction), "flop", ceilings.flops[dtype])


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
        seconds=interleaved(calls, plan.budget(), timer_of(case.device)),
        work=work_of(case, direction, dtype, ceilings),
    )


def _evict() -> None:
    torch.empty(EVICTION_BYTES, dtype=torch.uint8).fill_(1)


def _evict_device() -> None:
    """Queued before a turn, this empties the GPU's caches, and keeps it busy until the turn is queued, too."""
    from trilby.kernels.gpu.tune import empty_caches_and_hold  # triton is not everywhere

    empty_caches_and_hold()
