"""What a GPU is timed and judged by, as far as it goes without one: a simulated device, and rates of known seconds."""

import itertools
from dataclasses import replace

import pytest
import torch
from trilby.bench import launching, rates
from trilby.bench.__main__ import main
from trilby.bench.cases import GPU_ATTENTION_CASES, GPU_NORM_CASES, AttentionCase, NormCase
from trilby.bench.contestants import contestants, prepare
from trilby.bench.machine import Ceilings, Copy, Machine
from trilby.bench.measure import Budget, DeviceTimer, differing_runs, interleaved
from trilby.bench.report import foot, is_alarm, to_json
from trilby.bench.results import OURS, RIVAL, Repeat, Row, Run, Work
from trilby.bench.rivals import BACKENDS, rivals
from trilby.bench.suite import Plan, available


class SimulatedDevice:
    """A processor that queues work, and a device that does it in order; neither moves unless it is told to."""

    def __init__(self):
        self.host = self.device = 0.0
        self.log = []

    def launch(self, name, host, device):
        """A call that takes the processor `host` seconds and then the device `device`."""

        def call():
            self.host += host
            self.device = max(self.device, self.host) + device
            self.log.append(name)

        return call

    def event(self):
        return SimulatedEvent(self)


class SimulatedEvent:
    def __init__(self, simulated):
        self.simulated, self.at = simulated, None

    def record(self):
        self.at = max(self.simulated.device, self.simulated.host)

    def synchronize(self):
        self.simulated.host = max(self.simulated.host, self.at)
        self.simulated.log.append("wait")

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def timed(simulated, calls, flush, rounds=5):
    budget = Budget(seconds=0.0, least_rounds=rounds, before=flush)
    return interleaved(calls, budget, DeviceTimer(simulated.event))


def test_a_devices_time_is_between_its_marks_and_hides_the_launch_behind_the_flush():
    simulated = SimulatedDevice()
    calls = {"A": simulated.launch("A", 20e-6, 50e-6), "B": simulated.launch("B", 30e-6, 5e-6)}
    seconds = timed(simulated, calls, simulated.launch("-", 5e-6, 125e-6))
    assert seconds["A"] == pytest.approx((50e-6,) * 5)
    assert seconds["B"] == pytest.approx((5e-6,) * 5)


def test_a_launch_that_outlasts_the_work_is_seen():
    simulated = SimulatedDevice()
    calls = {"A": simulated.launch("A", 900e-6, 50e-6)}
    seconds = timed(simulated, calls, simulated.launch("-", 5e-6, 125e-6))
    assert min(seconds["A"]) > 100e-6


def test_every_turn_follows_a_flush_and_nothing_waits_before_all_are_queued():
    simulated = SimulatedDevice()
    calls = {"A": simulated.launch("A", 1e-6, 1e-6), "B": simulated.launch("B", 1e-6, 1e-6)}
    timed(simulated, calls, simulated.launch("-", 1e-6, 1e-6), rounds=3)
    log = "".join("." if each == "wait" else each for each in simulated.log)
    assert log.endswith("-A-B-A-B-A-B......")


def test_bits_that_change_are_counted():
    steady, changing = itertools.repeat(1.0), itertools.cycle([1.0, 1.0, 1.5])
    assert differing_runs(lambda: {"x": torch.full((3,), next(steady))}, 9) == 0
    assert differing_runs(lambda: {"x": torch.full((3,), next(changing))}, 9) == 3
    assert differing_runs(lambda: {"x": torch.tensor([float("nan")])}, 2) == 0
    signs = itertools.cycle([0.0, -0.0])
    assert differing_runs(lambda: {"x": torch.tensor(next(signs))}, 3) == 2


def test_on_a_gpu_the_cases_are_its_own_and_caches_are_always_cold():
    plan = Plan(device="cuda")
    assert plan.cases == (*GPU_ATTENTION_CASES, *GPU_NORM_CASES)
    assert {case.device for case in plan.cases} == {"cuda"}
    assert all(case.B * case.T == 16384 and case.H * case.D == 2048 for case in GPU_ATTENTION_CASES)
    assert plan.budget().before is not None
    assert plan.repeats == 250
    assert not plan.includes("gpt")
    assert not plan.shows_allocator
    assert Plan().repeat_cases == ()
    assert 0 < len(Plan(device="cuda", quick=True).cases) < len(plan.cases)


def test_a_full_run_on_a_gpu_fits_eight_minutes():
    plan = Plan(device="cuda")
    rows = sum(len(case.dtypes) * 2 for case in plan.cases)
    assert rows * plan.budget().seconds < 0.25 * 8 * 60  # the rest: checking, compiling, and 250 repeats of 5 cases


@pytest.mark.parametrize(
    ("only", "operations"),
    [(None, ["attention"] * 2 + ["layer_norm"] * 2), ("norm", ["layer_norm"] * 2), ("attention", ["attention"] * 2)],
)
def test_what_launching_takes_is_told_of_the_groups_that_run(monkeypatch, only, operations):
    cases = {"attention": (AttentionCase(1, 2, 24, 8, ""),), "norm": (NormCase(8, 32, ""),)}
    monkeypatch.setattr(launching, "CASES", cases)
    monkeypatch.setattr(launching, "BUDGET", Budget(seconds=0.0))
    lines = list(launching.launch_lines(Plan(only, device="cuda")))
    assert [line.split(", ")[1].split()[0] for line in lines] == operations
    assert all(" trilby " in line and " PyTorch " in line for line in lines)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_case_without_a_mask_is_computed_without(is_causal):
    case = AttentionCase(1, 2, 24, 8, "", is_causal=is_causal)
    job = prepare(case, torch.float32)
    sides = contestants(compiled=False, case=case)
    ours, theirs = (job.call(sides[name], "forward")()["output"] for name in (OURS, RIVAL))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(theirs[0, :, 0], job.inputs["value"].detach()[0, :, 0]) == is_causal


def test_pytorchs_backends_take_part_and_those_that_cannot_say_why():
    case = AttentionCase(1, 2, 32, 16, "")
    job = prepare(case, torch.float32)
    sides = contestants(compiled=False) | {name: rivals("attention")[name] for name in BACKENDS}
    calls, absent = available({name: job.call(layers, "forward+backward") for name, layers in sides.items()})
    assert list(calls) == [RIVAL, OURS, "PyTorch flash"]  # a processor has no other backend
    assert set(absent) == {"PyTorch cuDNN", "PyTorch efficient"}
    assert all(absent.values())
    torch.testing.assert_close(calls["PyTorch flash"](), calls[RIVAL]())


def test_a_failure_of_ours_is_no_absence():
    def fail():
        raise RuntimeError("on purpose")

    calls, absent = available({OURS: fail, "other": fail})
    assert set(calls) == {OURS}
    assert absent == {"other": "on purpose"}


def row(shape, seconds, operation="attention", unit="flop", absent=()):
    return Row(
        operation=operation,
        shape=shape,
        dtype="bfloat16",
        direction="forward",
        why="",
        seconds={name: (each,) * 3 for name, each in seconds.items()},
        work=Work(1e12 if unit == "flop" else 1e9, unit, 1e15),
        absent=dict.fromkeys(absent, "no kernel"),
    )


MACHINE = Machine("processor", 2, 2, 0, 0, "Linux", 0.0, "", {}, {}, gpu="a GPU")
ROWS = (
    row("8x32x2048x64", {RIVAL: 4e-3, OURS: 2e-3, "PyTorch flash": 1e-3}, absent=["PyTorch cuDNN"]),
    row("4x32x4096x64", {RIVAL: 4e-3, OURS: 2e-3, "PyTorch cuDNN": 3e-3}),
    row("4096x768", {RIVAL: 2e-3, OURS: 1e-3}, "layer_norm", "byte"),
)
RUN = Run("bench", MACHINE, Ceilings({}, (Copy(1, 1.0),)), ROWS, (), {}, 1.0)


def test_work_per_second_is_told_in_the_fields_units():
    assert rates.rate_cell(ROWS[0], OURS) == "500 (500-500)"
    assert rates.rate_cell(ROWS[2], OURS) == "1000 (1000-1000)"
    assert rates.rate_cell(ROWS[0], "PyTorch cuDNN") == "-"
    assert rates.rate_cell(ROWS[2], "PyTorch flash") == ""


def test_the_slow_rounds_are_the_20th_percentile_of_the_rate():
    uneven = replace(ROWS[0], seconds={OURS: (1e-3, 2e-3, 4e-3)})
    rate = uneven.rate(OURS)
    assert rate.p20 < rate.p50 == 1e12 / 2e-3 < rate.p80


def test_who_is_faster_is_told_and_who_cannot_take_part():
    assert [rates.best_other(each) for each in ROWS] == ["PyTorch flash", "PyTorch cuDNN", RIVAL]
    lines = rates.losses(RUN)
    assert lines[0] == "3 cases: in 1 somebody is faster than trilby."
    assert lines[1:] == ["PyTorch cuDNN cannot run some cases: no kernel (8x32x2048x64)"]
    assert rates.rates_table(RUN).row_count == 3


def test_a_race_is_an_alarm_and_steady_bits_are_none():
    steady, racing = Repeat("attention 1x1", 250, 0), Repeat("layer_norm 2x2", 250, 3)
    assert not any(map(is_alarm, foot(replace(RUN, repeats=(steady,)))))
    (alarm,) = filter(is_alarm, foot(replace(RUN, repeats=(steady, racing))))
    assert "RACE" in alarm
    assert "layer_norm 2x2" in alarm
    assert to_json(replace(RUN, repeats=(racing,)))["repeats"][0]["differing"] == 3


def test_rows_that_differ_in_length_alone_make_a_picture():
    assert list(rates.families(ROWS)) == ["attention D 64 causal bfloat16 forward", "layer_norm bfloat16 forward"]
    full = replace(ROWS[0], shape="8x32x2048x64 full")
    assert list(rates.families([full])) == ["attention D 64 full bfloat16 forward"]


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib, which is not installed")
    paths = rates.write_plots(RUN, tmp_path / "deep")
    assert [path.name for path in paths] == [
        "attention_D_64_causal_bfloat16_forward.svg",
        "layer_norm_bfloat16_forward.svg",
    ]
    assert all("</svg>" in path.read_text() for path in paths)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(SystemExit, match="PyTorch finds no GPU here"):
        main(["--device", "cuda"])


@pytest.mark.parametrize("case", [NormCase(8, 16, "", add=True), NormCase(8, 16, "")])
def test_norms_have_rivals_only_where_packages_are_installed(case):
    assert set(rivals(case.operation)) <= {"Liger", "Apex", "flash-attn"}
