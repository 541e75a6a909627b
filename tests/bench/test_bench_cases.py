"""How much work a case is, by formulas that can be checked by hand, and what the tables of cases must contain."""

import pytest
from trilby.bench.cases import (
    ATTENTION_CASES,
    NORM_CASES,
    SELF_CHECKS,
    AttentionCase,
    NormCase,
    VarlenCase,
    attention_flops,
    attention_work,
    norm_bytes,
    read_bytes,
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


def test_padding_shared_heads_and_short_sequences_count_what_is_looked_at():
    full = attention_flops(2, 3, 8, 4, "forward", is_causal=False)
    assert attention_work(AttentionCase(2, 3, 8, 4, "", is_causal=False, lengths=(8, 4)), "forward") == 0.75 * full
    assert attention_work(AttentionCase(2, 3, 8, 4, "", key_heads=1), "forward") == full / 2
    packed = VarlenCase((2, 8), 3, 4, "")
    assert attention_work(packed, "forward") == sum(attention_flops(1, 3, T, 4, "forward") for T in (2, 8))


def test_one_query_reads_all_keys_and_values_of_the_heads_that_have_them():
    assert read_bytes(AttentionCase(2, 6, 1, 4, "", cached=10, key_heads=3), 2) == 2 * (2 * 3 * 10 * 4) * 2


def test_the_cases_hold_what_a_gpt_runs_and_what_it_may_lose():
    attention = [case for case in ATTENTION_CASES if isinstance(case, AttentionCase)]
    plain = {AttentionCase(case.B, case.H, case.T, case.D, case.why, case.packed, case.quick) for case in attention}
    shapes = {(case.B, case.H, case.T, case.D) for case in plain.intersection(attention)}
    assert shapes == {(1, 12, 128, 64), (4, 12, 256, 64), (4, 12, 1024, 64), (1, 12, 4096, 64), (1, 16, 2048, 128)}
    assert any(case.packed for case in attention)
    for add in (False, True):
        sizes = {(case.N, case.C) for case in NORM_CASES if case.add == add and case.is_centered}
        assert sizes == {(8, 32), (64, 768), (4096, 768), (8192, 768), (8192, 1600), (1024, 12288)}


def test_the_cases_hold_what_newer_models_run():
    shapes = {case.shape: case for case in ATTENTION_CASES}
    assert shapes["1x12/4x1024x64"].heads_of_keys == 4
    assert shapes["8x12x1/8192x64"].directions == ("forward",)
    assert shapes["1x12x1024x64 dropout"].directions == ("forward+backward",)
    assert len(shapes["4x12x512x64 padded"].lengths) == 4
    assert min(shapes["4x12x(100-1000)x64"].lengths) == 100
    assert {case.add for case in NORM_CASES if not case.is_centered} == {False, True}


def test_every_case_says_why_and_is_named_once():
    cases = (*ATTENTION_CASES, *NORM_CASES)
    assert all(case.why for case in cases)
    assert len({(case.operation, case.shape) for case in cases}) == len(cases)


def test_a_quick_run_has_every_kind_of_case():
    quick = [case for case in (*ATTENTION_CASES, *NORM_CASES) if case.quick]
    norms = {"layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"}
    assert {case.operation for case in quick} == {"attention", "varlen_attn", *norms}


def test_self_checks_are_cases_of_the_table():
    cases = (*ATTENTION_CASES, *NORM_CASES)
    assert {type(case) for case, _ in SELF_CHECKS} == {AttentionCase, NormCase}
    assert all(case in cases for case, _ in SELF_CHECKS)
