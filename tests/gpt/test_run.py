"""A run leaves everything in its folder, and a run that is killed anywhere goes on as if it had not been."""

import csv
import os
import signal
import subprocess
import sys

import pytest
from trilby.gpt import Checkpoint
from trilby.gpt.__main__ import main
from trilby.gpt.plot import Curve, draw_losses, smoothed
from trilby.gpt.record import COLUMNS, LossTable
from trilby.gpt.train import Step

SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--batch-size", "2"]
STEPS = ["--max-steps", "12", "--save-interval", "4", "--eval-interval", "6", "--eval-batches", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text[:2000], encoding="utf-8")
    (tmp_path / "b.txt").write_text(text[2000:], encoding="utf-8")
    return tmp_path


def test_it_leaves_everything_in_its_folder(here):
    pytest.importorskip("matplotlib")
    tokenizer = ["--tokenizer", "byte-pair", "--vocab-size", "270", "--sampler", "packed"]
    assert main(["train", "--text", "a.txt", "b.txt", *tokenizer, "--sample-tokens", "9", *SMALL, *STEPS]) == 0
    run = here / "run"
    names = {"checkpoint.safetensors", "config.toml", "losses.csv", "losses.svg", "samples.txt", "tokens"}
    assert {path.name for path in run.iterdir()} == names
    rows = list(csv.DictReader((run / "losses.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert [row["step"] for row in rows if row["validation_loss"]] == ["6", "12"]
    assert (run / "losses.svg").read_text().startswith("<?xml")
    samples = (run / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("---")] == [
        f"--- after step {step}" for step in (4, 8, 12)
    ]
    tokenizer = Checkpoint.open(run / "checkpoint.safetensors").make_tokenizer()
    assert tokenizer.vocab_size == 270
    again = ["train", "--config", "run/config.toml", "--run", "again", "--sample-tokens", "9"]
    assert main(again) == 0
    assert (here / "again" / "samples.txt").read_text() == samples


def test_the_default_text_is_kept_where_no_file_has_it(here, monkeypatch):
    monkeypatch.delenv("TRILBY_TEXT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    assert main(["train", *SMALL, "--max-steps", "1", "--eval-interval", "0", "--sample-tokens", "0"]) == 0
    assert "assignment" in (here / "run" / "text.txt").read_text(encoding="utf-8")


def test_a_training_is_not_begun_over_another(here, capsys):
    command = ["train", "--text", "a.txt", *SMALL, "--max-steps", "1", "--eval-interval", "0", "--sample-tokens", "0"]
    assert (main(command), main(command)) == (0, 1)
    assert "run has a checkpoint; --resume goes on with it" in capsys.readouterr().err


def test_a_compiled_and_an_eager_run_go_on_from_each_others_checkpoints(here, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda module: compiled.append(type(module).__name__))
    common = ["--text", "a.txt", *SMALL, "--eval-interval", "0", "--sample-tokens", "0"]
    assert main(["train", *common, "--compile", "--max-steps", "2"]) == 0
    assert compiled == ["Transformer"]
    assert main(["train", "--resume", "--no-compile", "--max-steps", "3"]) == 0
    assert compiled == ["Transformer"]
    assert main(["train", "--resume", "--compile", "--max-steps", "4"]) == 0
    assert compiled == ["Transformer"] * 2


KILLED = """
import os, signal, sys
from trilby.gpt import Training
from trilby.gpt.__main__ import main

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

place, step = sys.argv[1], int(sys.argv[2])
step_function = Training.step

def counted(training):
    if training.steps_done == step and place == "step":
        die()
    return step_function(training)

Training.step = counted
if place == "save":
    os.replace = lambda source, target, replace=os.replace: (
        die() if "safetensors" in str(target) and os.path.exists(target) else replace(source, target)
    )
main(sys.argv[3:])
"""


@pytest.mark.parametrize("place", ["step", "save"])
def test_a_killed_run_goes_on_bit_for_bit(here, place):
    common = ["--text", "a.txt", "b.txt", "--dropout", "0.1", "--accumulation-steps", "2", "--sampler", "padded"]
    common += ["--sample-tokens", "5", *SMALL, *STEPS]
    assert main(["train", *common, "--run", "whole"]) == 0
    command = [sys.executable, "-c", KILLED, place, "7", "train", *common, "--run", "parts"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, timeout=300, env=environment).returncode == -signal.SIGKILL
    assert Checkpoint.open("parts/checkpoint.safetensors").steps_done == 4
    assert main(["train", "--resume", "--run", "parts", "--sample-tokens", "5"]) == 0
    ours, theirs = (Checkpoint.open(f"{name}/checkpoint.safetensors").checksums for name in ("parts", "whole"))
    assert ours == theirs


def test_a_table_cut_short_by_a_kill_loses_no_step_that_is_kept(tmp_path):
    path = tmp_path / "losses.csv"
    table = LossTable(path, 0)
    for number in (1, 2, 3):
        table.add(Step(number, 1.0, 0.1, 0.5, 8))
    table.close()
    path.write_text(path.read_text()[:-8])
    again = LossTable(path, 2)
    again.close()
    assert [row["step"] for row in again.rows] == ["1", "2"]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'trilby\[plot\]'"):
        draw_losses(tmp_path / "losses.svg", [Curve("training", [1], [2])])


def test_the_same_curves_are_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        draw_losses(tmp_path / name, [Curve("training", [1, 2], [2, 1]), Curve("other", [1, 2], [3, 1], dashed=True)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_smoothed_curve_is_the_mean_around_each_point():
    curve = smoothed(Curve("loss", list(range(100)), [float(step % 2) for step in range(100)]))
    assert len(curve.x) == len(curve.y) == 91
    assert set(curve.y) == {0.5}
    assert smoothed(Curve("loss", [1, 2], [3.0, 4.0])) == Curve("loss", [1, 2], [3.0, 4.0])
