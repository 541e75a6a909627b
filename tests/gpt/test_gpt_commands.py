"""The commands, as a user runs them, and what a user without the optional packages sees."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trilby.gpt import Checkpoint
from trilby.gpt.__main__ import main, parser

ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # models as small as these gain nothing from a second thread
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--batch-size", "4"]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "trilby.gpt", *arguments], cwd=cwd, capture_output=True, text=True, env=ENV, timeout=120
    )


@pytest.fixture
def file(tmp_path, text):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path / "text.txt"


def test_train_resume_and_generate(file, tmp_path):
    trained = run("train", "--text", "text.txt", "--max-steps", "30", "--eval-interval", "10", *SMALL, cwd=tmp_path)
    assert (trained.returncode, trained.stderr.count("validation loss")) == (0, 3), trained.stderr
    assert "text: 5,130 tokens of 26 kinds" in trained.stdout
    losses = [float(loss) for loss in re.findall(r": loss ([\d.]+),", trained.stderr)]
    assert losses[-1] < losses[0]
    assert Checkpoint.open(tmp_path / "run" / "checkpoint.safetensors").steps_done == 30

    resumed = run("train", "--resume", "--max-steps", "40", cwd=tmp_path)
    assert (resumed.returncode, "after step 40" in resumed.stdout) == (0, True), resumed.stderr

    first, second = (run("generate", "--prompt", "99 ", "--max-new-tokens", "20", cwd=tmp_path) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == second.stdout
    assert first.stdout.startswith("99 ")
    assert len(first.stdout) == len("99 ") + 20 + len("\n")


def test_resuming_is_training_on(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--text", "text.txt", "--eval-interval", "0", "--dropout", "0.1", *SMALL]
    assert main(["train", *common, "--max-steps", "20", "--run", "whole"]) == 0

    stopped = Stop(after=12)
    monkeypatch.setattr("trilby.gpt.__main__.progress", stopped)
    interrupted = ["train", *common, "--max-steps", "20", "--save-interval", "5", "--run", "parts"]
    assert main(interrupted) == 130
    assert Checkpoint.open("parts/checkpoint.safetensors").steps_done == 10
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert len(Path("parts/losses.csv").read_text().splitlines()) == 1 + 12
    assert main(["train", "--resume", "--run", "parts"]) == 0

    ours, theirs = (Checkpoint.open(f"{name}/checkpoint.safetensors").make_model() for name in ("parts", "whole"))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    tables = [Path(name, "losses.csv").read_text().splitlines() for name in ("parts", "whole")]
    ours, theirs = ([row.rsplit(",", 2)[0] for row in table] for table in tables)  # without the time of a step
    assert ours == theirs


class Stop:
    """Progress that ends as a user does with control-C."""

    def __init__(self, after):
        self.after = after

    def __call__(self, *_):
        return self

    def __enter__(self):
        def on_step(step):
            if step.number == self.after:
                raise KeyboardInterrupt

        return on_step

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--text", "nowhere.txt"], "nowhere.txt"),
        (["train", "--text", "text.txt", "--n-head", "3"], "n_embd is 128; it must be a multiple of n_head, 3"),
        (["train", "--text", "text.txt", "--block-size", "100000"], "at least 100001"),
        (["train", "--text", "text.txt", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["train", "--resume"], "checkpoint.safetensors"),
        (["train", "--resume", "--n-layer", "3"], "n_layer cannot change"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--sample-tokens", "-1"], "sample_tokens is -1"),
        (["generate"], "checkpoint.safetensors"),
        (["generate", "--checkpoint", "text.txt"], "not a safetensors file"),
        (["generate", "--temperature", "-1"], "temperature is -1"),
        (["generate", "--max-new-tokens", "-1"], "max_new_tokens is -1"),
    ],
)
def test_what_goes_wrong_is_one_line_that_says_what(arguments, message, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("trilby.gpt: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--n-layers", "3"], "did you mean --n-layer?"),
        (["train", "--max-step=3"], "did you mean --max-steps?"),
        (["write"], "invalid choice"),
        ([], "required"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(arguments)
    assert said in capsys.readouterr().err


def test_the_published_sizes_are_a_table(capsys):
    assert main(["presets"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:2] == ["preset", "layers"]
    sizes = {row[0]: row[5] for row in rows[1:]}
    assert (sizes["gpt2"], sizes["gpt3"]) == ("124,439,808", "174,604,259,328")
    assert rows[1][6:] == ["0.46", "GiB", "0.23", "GiB", "1.85", "GiB"]


WITHOUT = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
from trilby.gpt.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("missing", "arguments", "status", "said"),
    [
        ("rich tiktoken", ["train", "--text", "text.txt", "--max-steps", "2", *SMALL], 0, "step 2: loss"),
        ("tiktoken", ["train", "--text", "text.txt", "--tokenizer", "gpt2"], 1, "pip install 'trilby[gpt]'"),
        ("safetensors", ["train", "--text", "text.txt", "--max-steps", "1", *SMALL], 1, "pip install 'trilby[gpt]'"),
    ],
)
def test_without_an_optional_package(missing, arguments, status, said, file, tmp_path):
    command = [sys.executable, "-c", WITHOUT, missing, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENV, timeout=120)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
