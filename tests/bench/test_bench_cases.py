"""How much work a case is, by formulas that can be checked by hand, and what the tables of cases must contain."""

import pytest
from trilby.bench.cases import (
    ATTENTION_CASES,
    NORM_CASES,
    SELF_CHECKS,
    AttentionCase,
    NormCase,
    attention_flops,
    norm_bytes,
)


def test_causal_attention_counts_half_of_two_matrix_products():
    # scores: 2·T·T·D, times values: 2·T·T·D, half of both masked; T = 8, D = 4, 3 x 2 heads
    assert attention_flops(3, 2, 8, 4, "forward") == 3 * 2 * (2 * 8 * 8 * 4 + 2 * 8 * 8 * 4) / 2


def test_backward_counts_two_and_a_half_times_the_forward():
    forward = attention_flops(1, 12, 4096, 64, "forward")
    assert attention_flops(1, 12, 4096, 64, "forward+backward") == 3.5 * forward
    assert forward == pytest.approx(25.77e9, rel=1e-3)


@pytest.mark.parametrize(
    ("add", "direction", "tensors"),
    [(False, "forward", 2), (False, "forward+backward", 5), (True, "forward", 4), (True, "forward+backward", 8)],
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_norms_count_whole_tensors(add, direction, tensors, itemsize):
    assert norm_bytes(NormCase(10, 7, "", add), direction, itemsize) == tensors * 10 * 7 * itemsize


def test_the_cases_hold_what_a_gpt_runs_and_what_it_may_lose():
    shapes = {(case.B, case.H, case.T, case.D) for case in ATTENTION_CASES}
    assert shapes == {(1, 12, 128, 64), (4, 12, 256, 64), (4, 12, 1024, 64), (1, 12, 4096, 64), (1, 16, 2048, 128)}
    assert any(case.packed for case in ATTENTION_CASES)
    for add in (False, True):
        sizes = {(case.N, case.C) for case in NORM_CASES if case.add == add}
        assert sizes == {(8, 32), (64, 768), (4096, 768), (8192, 768), (8192, 1600), (1024, 12288)}


def test_every_case_says_why_and_is_named_once():
    cases = (*ATTENTION_CASES, *NORM_CASES)
    assert all(case.why for case in cases)
    assert len({(case.operation, case.shape) for case in cases}) == len(cases)


def test_a_quick_run_has_every_kind_of_case():
    quick = [case for case in (*ATTENTION_CASES, *NORM_CASES) if case.quick]
    assert {case.operation for case in quick} == {"attention", "layer_norm", "add_layer_norm"}


def test_self_checks_are_cases_of_the_table():
    cases = (*ATTENTION_CASES, *NORM_CASES)
    assert {type(case) for case, _ in SELF_CHECKS} == {AttentionCase, NormCase}
    assert all(case in cases for case, _ in SELF_CHECKS)
