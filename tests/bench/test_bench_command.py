"""`python -m trilby.bench` as a user runs it."""

import json
import os
import subprocess
import sys

import pytest
from trilby.bench.__main__ import parse


def bench(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "trilby.bench", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_quick_prints_the_table_and_writes_the_same_as_json(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("shall I compare thee to a summer's day? " * 500)
    result = bench("--quick", cwd=tmp_path, TRILBY_TEXT=str(text))
    assert result.returncode == 0, result.stderr
    read = json.loads((tmp_path / "build" / "bench.json").read_text())
    assert read["command"] == "python -m trilby.bench --quick"
    gpt = {"GPT training", "GPT generation"}
    assert {row["operation"] for row in read["rows"]} >= {"attention", "layer_norm", "add_layer_norm"} | gpt
    for row in read["rows"]:
        assert all(cell in result.stdout for cell in row["cells"])
    assert all(training["agrees"] for training in read["trainings"])
    assert "time ratio" in result.stdout
    assert "A/A, PyTorch against itself" in result.stdout
    assert read["is_noisy"] == ("NOISY RUN" in result.stdout)


@pytest.mark.slow
def test_one_group_on_one_thread(tmp_path):
    result = bench("--quick", "--only", "norm", "--threads", "1", "--json", "here.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    read = json.loads((tmp_path / "here.json").read_text())
    assert read["machine"]["threads"] == 1
    assert read["trainings"] == []
    assert {row["operation"] for row in read["rows"] if not row["is_self_check"]} == {
        *("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--threads", "0"], "0 is not at least 1"), (["--only", "everything"], "invalid choice: 'everything'")],
)
def test_a_wrong_option_names_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
