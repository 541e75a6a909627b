"""Which launch choices a run on a GPU says to turn on; the measuring, and the clock, are injected."""

import itertools

import pytest

pytest.importorskip("triton", reason="there is nothing to launch without triton")

from trilby.bench.advice import HEAD_DIMS, advice, asked_here
from trilby.kernels.gpu.measured import Place
from trilby.kernels.gpu.targets import TARGETS, Device
from trilby.kernels.gpu.tune import Question, attention_choices, questions

HOPPER = Device(TARGETS["sm_90"], 132)
PLACE = Place("forward", "sm_90", "half", 128, 2**31, "plain")


def asked_for(*numbers):
    own = {"block_m": 128, "num_stages": 3}
    return Question(PLACE, own, tuple({**own, **each} for each in numbers), lambda: lambda: None)


def taking(*seconds):
    """A measure that finds one after the other."""
    each = iter(seconds)
    return lambda call: next(each)


def test_a_faster_choice_is_to_be_turned_on():
    (line,) = advice([asked_for({"num_stages": 2}, {"num_stages": 4})], taking(2.0, 3.0, 1.0), "a GPU", 10)
    assert line.startswith("turn on: forward D 128, num_stages = 4: 2.00 times as fast as")


def test_where_nothing_is_faster_the_tables_stay():
    (line,) = advice([asked_for({"num_stages": 2})], taking(2.0, 1.99), "a GPU", 10)
    assert line == "launch choices: the tables' own are the best of those asked in 1 questions."


def test_what_no_time_is_left_for_is_counted():
    clock = itertools.count(0, 6).__next__
    lines = advice([asked_for({"num_stages": 2})] * 4, taking(*[2.0, 1.0] * 4), "a GPU", 10, clock)
    assert [line.partition(":")[0] for line in lines] == ["turn on", "launch choices"]
    assert "no time was left for 3 of 4" in lines[1]


def test_usual_heads_in_half_precision_are_asked_for():
    asked = asked_here(questions(HOPPER, ("forward", "key_value", "query"), attention_choices))
    assert {question.place.table for question in asked} == {"forward", "key_value", "query"}
    assert {question.place.size for question in asked} <= set(HEAD_DIMS)
    assert all(question.candidates for question in asked)
    assert len(asked) * 5 * 5 < 300  # questions, launches each, seconds to compile one
