"""The table and the JSON show the same, hide no loss, and say loudly what must not be believed."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from trilby.bench.machine import Ceilings, Copy, Machine
from trilby.bench.report import cells, foot, heading, is_alarm, ratio_cell, table, to_json, write_json
from trilby.bench.results import COMPILED, OURS, RIVAL, RIVAL_AGAIN, Error, Row, Run, Training, Work

MACHINE = Machine("a processor", 2, 2, 2**34, 2**25, "Linux x86_64", 0.1, "AVX2", {"attention": "C++ (avx2)"}, {})
CEILINGS = Ceilings({"float32": 2e11, "bfloat16": 2e11}, (Copy(2**20, 5e10),))


def row(ours=1.0, rival=2.0, **changes):
    values = {
        "operation": "attention",
        "shape": "1x2x3x4",
        "dtype": "float32",
        "direction": "forward",
        "why": "a test",
        "seconds": {RIVAL: (rival,) * 5, OURS: (ours,) * 5},
        "work": Work(50.0, "flop", 100.0),
        "errors": (Error("output", {OURS: 1.5e-7, RIVAL: 2.5e-7}, 1e-8),),
    }
    return Row(**{**values, **changes})


def self_check(first=1.0, second=1.0):
    seconds = {RIVAL: (first,) * 5, RIVAL_AGAIN: (second,) * 5}
    return replace(row(), seconds=seconds, ours=RIVAL_AGAIN, errors=())


def training(ours=(3.0, 2.0, 1.5), rival=(3.0, 2.0, 1.5)):
    return Training("float32", "a text", {OURS: ours, RIVAL: rival, "float64": rival}, {OURS: 321.0, RIVAL: 123.0})


def run(*rows, trainings=()):
    return Run("python -m trilby.bench", MACHINE, CEILINGS, tuple(rows), trainings, {}, 12.0)


def printed(finished):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(finished))
    return console.file.getvalue()


def test_a_row_shows_case_errors_ratio_and_share():
    assert cells(row()) == (
        "attention 1x2x3x4 float32 forward",
        "1.5e-07 2.5e-07",
        "2.00 (2.00-2.00)",
        "50% (25%)",
    )


def test_the_spread_is_that_of_the_rounds():
    rivals = tuple(float(second) for second in range(1, 12))
    assert cells(row(seconds={RIVAL: rivals, OURS: (2.0,) * 11}))[2] == "3.00 (1.50-4.50)"


@pytest.mark.parametrize(
    ("rival", "expected"),
    [(0.5, "SLOWER 0.50"), (0.994, "SLOWER 0.99"), (0.996, "1.00"), (1.0, "1.00"), (1.01, "1.01")],
)
def test_a_losing_cell_is_marked(rival, expected):
    assert cells(row(ours=1.0, rival=rival))[2].startswith(expected + " (")


def test_the_table_shows_every_row_and_marks_the_losing_one():
    finished = run(row(shape="1x1x1x1"), row(ours=3.0, shape="2x2x2x2"), self_check())
    lines = [line for line in printed(finished).splitlines() if "1x" in line or "2x" in line]
    assert len(lines) == 3
    assert [line.split("float32")[0].strip() for line in lines if "SLOWER" in line] == ["attention 2x2x2x2"]
    assert "2 cases: trilby is faster in 1, even in 0, slower in 1." in foot(finished)


def test_a_loss_against_compiled_has_a_column_and_a_mark():
    against_both = row(seconds={RIVAL: (2.0,) * 5, OURS: (1.0,) * 5, COMPILED: (0.5,) * 5})
    assert ratio_cell(against_both, COMPILED) == "SLOWER 0.50 (0.50-0.50)"
    assert "SLOWER 0.50" in printed(run(against_both))


def test_the_longest_case_keeps_to_one_line():
    longest = row(shape="4x12x1024x64 packed", dtype="bfloat16", direction="forward+backward", ours=9.0)
    assert "attention 4x12x1024x64 packed bfloat16 forward+backward" in printed(run(longest))


def test_an_error_above_the_rule_is_an_alarm():
    inexact = row(errors=(Error("grad_key", {OURS: 1e-3, RIVAL: 1e-6}, 1e-8),))
    assert cells(inexact)[1] == "INEXACT 1.0e-03 1.0e-06"
    assert [line for line in foot(run(inexact)) if is_alarm(line)] == [
        "INEXACT: error above the rule in attention 1x2x3x4 float32 forward."
    ]


@pytest.mark.parametrize(("second", "noisy"), [(1.0, False), (1.04, False), (1.07, True), (0.93, True)])
def test_a_noisy_run_says_so(second, noisy):
    finished = run(row(), self_check(), self_check(second=second))
    assert finished.is_noisy == noisy
    assert any(line.startswith("NOISY RUN:") and is_alarm(line) for line in foot(finished)) == noisy
    assert any(f"reads 1.00 (1.00-1.00), {1 / second:.2f}" in line for line in foot(finished))


def test_a_self_check_is_neither_won_nor_lost():
    finished = run(self_check(first=0.5))
    assert not finished.rows[0].is_slower
    assert "0 cases: trilby is faster in 0, even in 0, slower in 0." in foot(finished)


@pytest.mark.parametrize(
    ("ours", "agrees"),
    [((3.0, 2.0, 1.5), True), ((3.0, 2.1, 1.5), True), ((3.0, 2.9, 1.5), False), ((3.0, float("nan"), 1.5), False)],
)
def test_loss_curves_agree_if_they_differ_less_than_they_move(ours, agrees):
    compared = training(ours)
    assert compared.usual_change == 0.75
    assert compared.agrees == agrees
    lines = foot(run(trainings=(compared,)))
    assert any("curves agree" in line for line in lines) == agrees
    assert any("321 tokens/s with trilby, 123 with PyTorch" in line for line in lines)
    assert any(line.startswith("LOSS CURVES DISAGREE:") and is_alarm(line) for line in lines) != agrees


def test_three_lines_say_how_to_read_the_table():
    assert [line.partition(":")[0] for line in foot(run(row()))[:3]] == ["error", "time ratio", "share of the ceiling"]
    assert not any(is_alarm(line) for line in foot(run(row(), self_check(), trainings=(training(),))))


def test_the_heading_says_where_and_what_is_possible():
    text = " ".join(heading(MACHINE, CEILINGS))
    assert all(
        part in text for part in ("a processor", "2 threads", "16 GiB", "float32 200 GFLOP/s", "50 GB/s of 1 MiB")
    )


def test_the_json_holds_what_the_table_shows(tmp_path):
    finished = run(row(), row(ours=3.0), self_check(), trainings=(training(),))
    write_json(finished, tmp_path / "folder" / "bench.json")
    read = json.loads((tmp_path / "folder" / "bench.json").read_text())
    text = printed(finished)
    assert [tuple(entry["cells"]) for entry in read["rows"]] == [cells(each) for each in finished.rows]
    for entry in read["rows"]:
        assert all(cell in text for cell in entry["cells"])
        ratio, (ours, rival) = entry["ratio"], reversed(entry["share"].values())
        assert f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})" in entry["cells"][2]
        assert entry["cells"][3] == f"{ours:.0%} ({rival:.0%})"
        assert entry["is_slower"] == ("SLOWER" in entry["cells"][2])
    assert read["foot"] == foot(finished)


def test_the_json_holds_raw_numbers_and_their_quantiles():
    entry = to_json(run(row(seconds={RIVAL: (1.0, 2.0, 3.0), OURS: (1.0, 1.0, 1.0)})))["rows"][0]
    assert entry["seconds"][RIVAL] == {"p20": 1.4, "p50": 2.0, "p80": 2.6, "raw": [1.0, 2.0, 3.0]}
    assert entry["errors"][0]["by"] == {OURS: 1.5e-7, RIVAL: 2.5e-7}
    assert entry["work"] == {"amount": 50.0, "unit": "flop", "ceiling": 100.0}


def test_the_json_names_machine_versions_settings_and_command():
    read = to_json(run(row()))
    assert {"schema", "command", "settings", "machine", "ceilings", "rows", "trainings", "foot"} <= set(read)
    assert {"processor", "threads", "versions", "load", "services"} <= set(read["machine"])
