"""Generated text on a terminal and in a pipe."""

import io
import sys

import pytest
from trilby.gpt.display import Stopwatch, show

PIECES = ["[a]", "", "é\n", ""]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_a_pipe_gets_the_text_and_nothing_else():
    file = io.StringIO()
    show("[b]:smile:", PIECES, file)
    assert file.getvalue() == "[b]:smile:[a]é\n\n"


def test_a_terminal_gets_the_prompt_in_bold_and_the_speed():
    pytest.importorskip("rich")
    file = Terminal()
    show("[b]:smile:", PIECES, file)
    prompt, rest = file.getvalue().split("[a]")
    assert "[b]:smile:" in prompt
    assert "\x1b[1m" in prompt
    assert "3 tokens, the first after 0.00 s, then" in rest


def test_a_terminal_without_rich_gets_the_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    file = Terminal()
    show("b", PIECES, file)
    assert file.getvalue() == "b[a]é\n\n"


def test_each_piece_is_shown_before_the_next_is_made():
    file, seen = io.StringIO(), []

    def pieces():
        for piece in "xyz":
            seen.append(file.getvalue())
            yield piece

    show("", pieces(), file)
    assert seen == ["", "x", "xy"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_tokens_have_no_speed(count):
    watch = Stopwatch()
    list(watch.over("a" * count))
    assert watch.describe() == ""
