"""Interleaved timing, and the statistics of what it measured.

Contestants take turns, A B A B, so that whatever else the machine does meets all of them alike, and a ratio is taken
within a round, between neighbors in time. Medians and quantiles of rounds are reported, never a best or a mean.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# PyTorch timed against itself must read 1 within this; else the run is too noisy to be believed, and says so.
SELF_CHECK_BOUND = 0.05
# A call this long takes about as long when it is not warm yet: its first run is all that planning needs, and, of
# contestants that all are so long, a round like any other.
LONG_CALL = 0.1
# Where the slowest takes so many times as long as the fastest, one round tells who is: without instructions for
# bfloat16, PyTorch's attention takes 6 s forward and backward at (1, 12, 4096, 64), 9 times as long as trilby's.
CLEAR_RATIO = 4


@dataclass(frozen=True)
class Budget:
    """How long contestants may take turns.

    Attributes:
        seconds: What all rounds together should take.
        least_rounds: Rounds that are run even when they take longer.
        most_rounds: Rounds after which a median no longer moves.
        sample_seconds: A call shorter than this is repeated within its turn: the clock and the first call after
            another contestant's cost microseconds.
        before: Called before every turn, outside the time taken; then a turn is a single call.
    """

    seconds: float
    least_rounds: int = 3
    most_rounds: int = 200
    sample_seconds: float = 1e-3
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile of some numbers."""

    p20: float
    p50: float
    p80: float


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of `values` lie, interpolated linearly between neighbors.

    Raises:
        ValueError: If there are no values, or `fraction` is outside 0..1.
    """
    if not values or not 0 <= fraction <= 1:
        raise ValueError(f"values were {len(values)} and fraction {fraction}; allowed are at least 1 value and 0..1")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def quantiles(values: Sequence[float]) -> Quantiles:
    """The percentiles of `values` that are reported."""
    return Quantiles(quantile(values, 0.2), quantile(values, 0.5), quantile(values, 0.8))


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, ...]:
    """Numerator / denominator, round by round.

    Raises:
        ValueError: If they do not have as many rounds.
    """
    if len(numerator) != len(denominator):
        raise ValueError(
            f"numerator has {len(numerator)} rounds and denominator {len(denominator)}; allowed is as many"
        )
    return tuple(a / b for a, b in zip(numerator, denominator))


def rounds_and_calls(seconds_per_call: Sequence[float], budget: Budget) -> tuple[int, int]:
    """How many rounds to run, and how many calls make one contestant's turn, for calls that take so long.

    All contestants make as many calls in a turn, so that their turns differ in nothing but what is called.
    """
    fastest = max(min(seconds_per_call), 1e-9)
    calls = 1 if budget.before else max(1, math.ceil(budget.sample_seconds / fastest))
    round_seconds = max(calls * sum(seconds_per_call), 1e-9)
    is_clear = fastest > LONG_CALL and max(seconds_per_call) > CLEAR_RATIO * fastest
    least = 1 if is_clear else budget.least_rounds
    return min(max(int(budget.seconds / round_seconds), least), budget.most_rounds), calls


class Timer(Protocol):
    """What times a turn."""

    def time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Run, and return what tells the seconds it took: at once, or later, when a device is done."""
        ...


@dataclass(frozen=True)
class HostTimer:
    """The time that passes on this processor, for calls that return when they are done."""

    clock: Callable[[], float] = time.perf_counter

    def time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Run; the time is known at once."""
        start = self.clock()
        run()
        seconds = self.clock() - start
        return lambda: seconds


HOST = HostTimer()


@dataclass(frozen=True)
class DeviceTimer:
    """The time that passes on a device between two marks in its queue.

    Nothing waits for the device before all turns are queued. While it works on what was queued before (the writing that
    empties its caches, and a millisecond's wait), the processor queues the turn: its own time is hidden, as it is in a
    training that keeps the GPU busy, unless launching takes longer than that.

    Attributes:
        event: Makes a mark: `torch.cuda.Event(enable_timing=True)`, or what has its `record`, `synchronize` and
            `elapsed_time` (in milliseconds).
    """

    event: Callable[[], Any]

    def time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Queue the work between two marks; asking for the time waits for the second."""
        start, end = self.event(), self.event()
        start.record()
        run()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return seconds


def interleaved(
    contestants: Mapping[str, Callable[[], object]], budget: Budget, timer: Timer = HOST
) -> dict[str, tuple[float, ...]]:
    """Seconds per call of each contestant, one number per round, measured in turns: A B A B.

    What a call returns is freed within the time taken, as it is in a model.
    """
    with _no_garbage_collection():
        estimates = [_estimate(call, budget, timer) for call in contestants.values()]
        rounds, calls = rounds_and_calls(estimates, budget)
        known = [(seconds,) if min(estimates) > LONG_CALL else () for seconds in estimates]
        turns: dict[str, list[Callable[[], float]]] = {name: [] for name in contestants}
        for _ in range(rounds - len(known[0])):
            for name, call in contestants.items():
                turns[name].append(_turn(call, calls, budget.before, timer))
        return {
            name: (*first, *(seconds() / calls for seconds in own)) for first, (name, own) in zip(known, turns.items())
        }


def _estimate(call: Callable[[], object], budget: Budget, timer: Timer) -> float:
    """Seconds of one call, warm: a first call tells only whether a second one is needed to know."""
    first = _turn(call, 1, budget.before, timer)()
    return first if first > LONG_CALL else _turn(call, 1, budget.before, timer)()


def _turn(
    call: Callable[[], object], calls: int, before: Callable[[], object] | None, timer: Timer
) -> Callable[[], float]:
    if before is not None:
        before()

    def run() -> None:
        for _ in range(calls):
            call()

    return timer.time(run)


def differing_runs(call: Callable[[], Mapping[str, Tensor]], repeats: int) -> int:
    """How many of so many more calls return other bits than the first: a race, or an order that changes."""
    first = call()
    return sum(any(not _same_bits(first[name], each) for name, each in call().items()) for _ in range(repeats))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector would add its pauses to whoever's turn it is."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
