"""The plan of a run, and the rows and trainings that it makes."""

from dataclasses import replace

import pytest
import torch
from trilby.bench import suite
from trilby.bench.cases import ATTENTION_CASES, NORM_CASES, SELF_CHECKS, AttentionCase, NormCase, VarlenCase
from trilby.bench.machine import Ceilings, Copy, Read
from trilby.bench.measure import Budget
from trilby.bench.results import OURS, RIVAL
from trilby.bench.suite import Plan, kernel_rows, work_of
from trilby.bench.training import LESSON, QUICK_LESSON, train, training_steps


@pytest.fixture(autouse=True)
def _one_thread():
    """These are about what is done, not how fast; one thread needs nobody to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CEILINGS = Ceilings({"float32": 1e11, "bfloat16": 2e11}, (Copy(2**20, 5e10),), (Read(2**20, 7e10),))


def test_a_full_plan_has_every_case_and_the_allocator_twice():
    plan = Plan()
    assert plan.cases == (*ATTENTION_CASES, *NORM_CASES)
    assert plan.kernel_steps == len(SELF_CHECKS) + sum(2 * len(case.directions) for case in plan.cases) + 2


@pytest.mark.parametrize(
    ("only", "kinds"), [("attention", {AttentionCase, VarlenCase}), ("norm", {NormCase}), ("gpt", set())]
)
def test_one_group_alone(only, kinds):
    plan = Plan(only)
    assert {type(case) for case in plan.cases} == kinds
    assert plan.includes(only)
    assert not plan.includes("another")


def test_cold_evicts_before_every_turn():
    assert Plan().budget().before is None
    assert Plan(cold=True).budget().before is not None


def test_work_has_the_ceiling_of_its_kind():
    attention, norm = AttentionCase(1, 1, 8, 4, ""), NormCase(1024, 512, "")
    assert work_of(attention, "forward", "bfloat16", CEILINGS).ceiling == 2e11
    assert work_of(norm, "forward", "bfloat16", CEILINGS).amount == 2 * 1024 * 512 * 2
    assert work_of(norm, "forward", "bfloat16", CEILINGS).ceiling == 5e10
    one_query = AttentionCase(1, 1, 1, 4, "", is_causal=False, cached=8)
    assert work_of(one_query, "forward", "bfloat16", CEILINGS).ceiling == 7e10
    assert work_of(one_query, "forward", "bfloat16", CEILINGS).amount == 2 * 8 * 4 * 2
    assert work_of(VarlenCase((8,), 1, 4, ""), "forward", "float32", CEILINGS).ceiling == 1e11


def test_every_case_becomes_a_checked_row_and_advances(monkeypatch):
    attention = (
        AttentionCase(1, 2, 8, 4, "", quick=True),
        AttentionCase(1, 2, 8, 4, "", quick=True, dropout_p=0.5, directions=("forward+backward",)),
        AttentionCase(1, 2, 1, 4, "", quick=True, is_causal=False, cached=8, directions=("forward",)),
        VarlenCase((3, 8), 2, 4, "", quick=True),
    )
    norms = tuple(
        NormCase(4, 8, "", add, quick=True, is_centered=is_centered)
        for is_centered in (True, False)
        for add in (False, True)
    )
    monkeypatch.setattr(suite, "ATTENTION_CASES", attention)
    monkeypatch.setattr(suite, "NORM_CASES", norms)
    monkeypatch.setattr(suite, "SELF_CHECKS", ((attention[0], "forward"), (norms[0], "forward+backward")))
    monkeypatch.setattr(Plan, "budget", lambda self: Budget(0.0, least_rounds=2, sample_seconds=0.0))
    steps, plan = [], Plan(quick=True)
    rows = list(kernel_rows(plan, CEILINGS, lambda: steps.append(1)))
    comparisons = [row for row in rows if not row.is_self_check]
    assert len(rows) == len(steps) == plan.kernel_steps
    assert len({(row.operation, row.shape, row.dtype, row.direction) for row in comparisons}) == (6 * 2 + 1 + 1) * 2
    assert all(row.errors and row.is_exact and set(row.peak_bytes) == {RIVAL, OURS} for row in comparisons)
    assert [row.operation for row in rows if row.is_self_check] == ["attention", "layer_norm"]


def test_the_model_that_is_trained_is_named_by_its_sizes():
    assert LESSON.shape == "6 layers 6x64 B=2 T=256"


def test_training_in_turns_gives_two_curves_that_agree(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    monkeypatch.setenv("TRILBY_TEXT", str(text))
    lesson, steps = replace(QUICK_LESSON, steps=6), []
    rows, trainings = train(lesson, CEILINGS, lambda: steps.append(1))
    assert len(steps) == training_steps(lesson)
    assert [row.dtype for row in rows] == [training.dtype for training in trainings] == ["float32", "bfloat16"]
    for row, training in zip(rows, trainings):
        assert training.text == str(text)
        assert training.agrees
        assert row.is_exact
        assert training.losses[OURS][-1] < training.losses[OURS][0]
        assert len(row.seconds[OURS]) == len(row.seconds[RIVAL]) == lesson.steps - 2


def test_one_seed_starts_both_trainings_alike(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    monkeypatch.setenv("TRILBY_TEXT", str(text))
    state = torch.get_rng_state()
    _, (training, *_) = train(replace(QUICK_LESSON, steps=3), CEILINGS, lambda: None)
    first = [losses[0] for losses in training.losses.values()]
    assert max(first) - min(first) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
