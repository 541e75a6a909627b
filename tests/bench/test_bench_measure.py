"""Interleaved timing and its statistics: pure functions on numbers, and a clock that is known."""

import gc
import time

import pytest
from trilby.bench.measure import (
    Budget,
    HostTimer,
    Quantiles,
    interleaved,
    paired_ratios,
    quantile,
    quantiles,
    rounds_and_calls,
)


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_in(self, seconds, log, name):
        def call():
            self.now += seconds
            log.append(name)

        return call


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        ([7.0], 0.5, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2.5),
        ([0.0, 10.0], 0.2, 2.0),
        ([5.0, 1.0, 3.0], 0.0, 1.0),
        ([5.0, 1.0, 3.0], 1.0, 5.0),
    ],
)
def test_a_quantile_is_interpolated_between_neighbors(values, fraction, expected):
    assert quantile(values, fraction) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_a_quantile_of_nothing_or_outside_is_refused(values, fraction):
    with pytest.raises(ValueError, match="values were"):
        quantile(values, fraction)


def test_one_disturbed_round_does_not_move_the_median():
    assert quantiles([1.0] * 9 + [900.0]) == Quantiles(1.0, 1.0, 1.0)


def test_ratios_are_taken_within_a_round_so_drift_cancels():
    slowing_down = [1.0, 2.0, 3.0, 4.0]
    assert paired_ratios([2 * s for s in slowing_down], slowing_down) == (2.0,) * 4


def test_ratios_need_as_many_rounds_of_both():
    with pytest.raises(ValueError, match="numerator has 2 rounds"):
        paired_ratios([1.0, 2.0], [1.0])


def test_contestants_take_turns():
    clock, log = Clock(), []
    calls = {"A": clock.pass_in(0.5, log, "A"), "B": clock.pass_in(0.25, log, "B")}
    seconds = interleaved(calls, Budget(seconds=3.0), HostTimer(clock))
    assert seconds == {"A": (0.5,) * 4, "B": (0.25,) * 4}
    assert "".join(log) == "AB" * 4  # the first, to learn how long they take, is a round of calls so long


def test_how_long_a_shorter_call_takes_is_learned_before_the_rounds():
    clock, log = Clock(), []
    calls = {"A": clock.pass_in(0.05, log, "A"), "B": clock.pass_in(0.05, log, "B")}
    seconds = interleaved(calls, Budget(seconds=0.3, least_rounds=2), HostTimer(clock))
    assert seconds == {"A": pytest.approx((0.05,) * 3), "B": pytest.approx((0.05,) * 3)}
    assert "".join(log) == "AABB" + "AB" * 3


def test_a_short_call_is_repeated_within_its_turn_by_all_alike():
    clock, log = Clock(), []
    calls = {"A": clock.pass_in(0.002, log, "A"), "B": clock.pass_in(0.0005, log, "B")}
    interleaved(calls, Budget(seconds=0.0, least_rounds=2), HostTimer(clock))
    assert "".join(log) == "AABB" + "AABB" * 2  # a short call is warm the second time only; then the rounds


def test_what_happens_before_a_turn_is_not_timed():
    clock, log = Clock(), []
    calls = {"A": clock.pass_in(0.0001, log, "A"), "B": clock.pass_in(0.0001, log, "B")}
    budget = Budget(seconds=0.0, least_rounds=3, before=clock.pass_in(100.0, log, "-"))
    seconds = interleaved(calls, budget, HostTimer(clock))
    assert seconds["A"] == pytest.approx((0.0001,) * 3)
    assert "".join(log).endswith("-A-B-A-B-A-B")


@pytest.mark.parametrize(
    ("estimates", "budget", "expected"),
    [
        ((0.1, 0.1), Budget(seconds=2.0), (10, 1)),
        ((2.0, 2.0), Budget(seconds=1.0, least_rounds=7), (7, 1)),
        ((9.0, 2.0), Budget(seconds=1.0, least_rounds=7), (1, 1)),
        ((0.9, 0.05), Budget(seconds=1.0, least_rounds=7), (7, 1)),
        ((2**-20, 2**-20), Budget(seconds=1e9, most_rounds=30, sample_seconds=2**-10), (30, 1024)),
        ((0.0, 0.0), Budget(seconds=1.0, most_rounds=30, sample_seconds=0.0), (30, 1)),
    ],
)
def test_rounds_and_calls_fit_the_budget(estimates, budget, expected):
    assert rounds_and_calls(estimates, budget) == expected


def test_no_garbage_is_collected_during_a_turn_and_the_collector_comes_back():
    states = []
    interleaved({"A": lambda: states.append(gc.isenabled())}, Budget(0.0, least_rounds=3, sample_seconds=0.0))
    assert states[1:] == [False] * 4
    assert gc.isenabled()


def test_the_collector_comes_back_after_a_failure():
    def fail_when_timed():
        if not gc.isenabled():
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        interleaved({"A": fail_when_timed}, Budget(1.0))
    assert gc.isenabled()


def test_known_sleeps_are_measured_right():
    """Calibration: a sleep has a length that is known beforehand, up to the system's timer (0.1 ms)."""
    calls = {"long": lambda: time.sleep(0.020), "short": lambda: time.sleep(0.005)}
    seconds = interleaved(calls, Budget(seconds=0.6))
    assert quantiles(seconds["long"]).p50 == pytest.approx(0.020, rel=0.15)
    assert quantiles(seconds["short"]).p50 == pytest.approx(0.005, rel=0.15)
    assert quantiles(paired_ratios(seconds["long"], seconds["short"])).p50 == pytest.approx(4.0, rel=0.15)


def test_a_sleep_against_itself_reads_one():
    calls = {"once": lambda: time.sleep(0.01), "again": lambda: time.sleep(0.01)}
    seconds = interleaved(calls, Budget(seconds=0.5))
    assert quantiles(paired_ratios(seconds["once"], seconds["again"])).p50 == pytest.approx(1.0, abs=0.05)
