"""The README's tables say what the run's JSON says, losses in bold, and leave no row out."""

import json
from dataclasses import replace

import pytest
from trilby.bench.digest import digest, main
from trilby.bench.report import row_to_json
from trilby.bench.results import OURS, RIVAL, RIVAL_AGAIN, Row, Work

ROW = Row(
    operation="attention",
    shape="1x2x3x4",
    dtype="float32",
    direction="forward",
    why="a test",
    seconds={RIVAL: (2.0,), OURS: (1.0,)},
    work=Work(50.0, "flop", 100.0),
)


def lines_of(*rows):
    return digest([json.loads(json.dumps(row_to_json(row))) for row in rows])


def test_dtypes_and_directions_of_a_case_share_a_line():
    backward = replace(ROW, direction="forward+backward", seconds={RIVAL: (3.0,), OURS: (1.0,)})
    bf16 = replace(ROW, dtype="bfloat16", seconds={RIVAL: (4.0,), OURS: (1.0,)})
    assert "| attention 1x2x3x4 |  | 2.00 | 3.00 | 4.00 |  | 50% (25%) |" in lines_of(ROW, backward, bf16)


def test_a_loss_is_bold():
    slower = replace(ROW, seconds={RIVAL: (1.0,), OURS: (2.0,)})
    assert "| attention 1x2x3x4 |  | **0.50** |  |  |  | 25% (50%) |" in lines_of(slower)


def test_other_directions_have_lines_of_their_own():
    assert "| GPT 1x2x3x4 | int8 | generate |  | 2.00 | 50% (25%) |" in lines_of(
        replace(ROW, operation="GPT", dtype="int8", direction="generate")
    )


def test_a_setting_is_a_case_of_its_own_and_pytorch_against_itself_is_none():
    again = replace(ROW, seconds={RIVAL: (1.0,), RIVAL_AGAIN: (1.0,)}, ours=RIVAL_AGAIN)
    shown = [line for line in lines_of(ROW, replace(ROW, setting="cold"), again) if line.startswith("| attention")]
    assert [line.split(" |")[0] for line in shown] == ["| attention 1x2x3x4", "| attention 1x2x3x4, cold"]


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.json: No such file"):
        main(["--json", str(tmp_path / "nowhere.json")])
