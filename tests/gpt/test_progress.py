"""Progress: a bar on a terminal with rich, plain lines everywhere else."""

import io
import sys
from types import SimpleNamespace

import pytest
from trilby.gpt import Step
from trilby.gpt.ceiling import Ceiling
from trilby.gpt.progress import byte_progress, describe, duration, progress

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


def set_clock(monkeypatch, *seconds):
    """What the module reads of a clock, one after the other. Its own alone: rich keeps the function that it finds."""
    clock = SimpleNamespace(monotonic=iter(seconds).__next__)
    monkeypatch.setattr("trilby.gpt.progress.time", clock)


def test_a_step_is_one_line():
    assert describe(STEPS[2]) == "step 50: loss 3.5000, 2,000 tokens/s, validation loss 3.2500"


def test_the_share_of_the_machine_is_said_where_it_is_known():
    line = describe(STEPS[0], Ceiling(flops_per_token=300.0, rate=1e6))
    assert line == "step 1: loss 3.9900, 2,000 tokens/s (60% of the machine)"


def test_lines_say_how_long_the_rest_will_take(monkeypatch):
    set_clock(monkeypatch, 0.0, 2.0, 4.0, 6.0, 8.0)
    lines = shown(io.StringIO()).splitlines()
    assert lines[0].endswith("validation loss 3.2500, 1:40 left")
    assert "left" not in lines[1]


@pytest.mark.parametrize(("seconds", "text"), [(7.2, "0:07"), (750, "12:30"), (10800, "3:00:00")])
def test_a_duration_is_said_as_a_user_would(seconds, text):
    assert duration(seconds) == text


def test_bytes_are_a_bar_on_a_terminal_and_now_and_then_a_line_in_a_file(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    set_clock(monkeypatch, 0.0, 1.0, 6.0, 6.0)
    file = io.StringIO()
    with byte_progress("tokenizing", file) as on_bytes:
        on_bytes(100, 1000)
        on_bytes(600, 1000)
    assert file.getvalue() == "tokenizing: 60% of 1,000 bytes\n"
    pytest.importorskip("rich")
    monkeypatch.undo()
    monkeypatch.setenv("TERM", "xterm")
    with byte_progress("tokenizing", terminal := Terminal()) as on_bytes:
        on_bytes(1000, 1000)
    assert "1,000/1,000 bytes" in terminal.getvalue()


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
