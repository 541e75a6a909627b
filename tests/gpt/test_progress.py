"""Progress: a bar on a terminal with rich, plain lines everywhere else."""

import io
import sys

import pytest
from trilby.gpt import Step
from trilby.gpt.progress import describe, progress

STEPS = [
    Step(number, loss=4 - number / 100, learning_rate=1e-3, seconds=0.5, tokens=1000, validation_loss=validation)
    for number, validation in ((1, None), (2, None), (50, 3.25), (100, None))
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(file):
    with progress(max_steps=100, file=file) as on_step:
        for step in STEPS:
            on_step(step)
    return file.getvalue()


def test_a_step_is_one_line():
    assert describe(STEPS[2]) == "step 50: loss 3.5000, 2,000 tokens/s, validation loss 3.2500"


def test_a_file_gets_a_line_now_and_then_for_every_validation_and_for_the_last_step():
    lines = shown(io.StringIO()).splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 50", "step 100"]


def test_a_terminal_gets_a_bar_and_a_line_for_every_validation(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    output = shown(Terminal())
    assert "100/100" in output
    assert "validation loss 3.2500" in output


def test_without_rich_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(Terminal()) == shown(io.StringIO())
