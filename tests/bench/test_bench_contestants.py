"""One factory sets up every contestant; what it sets up must be the same computation, and wrong ones must be caught."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from trilby.bench.cases import AttentionCase, NormCase
from trilby.bench.contestants import TRUTH, contestants, errors, largest_difference, prepare, truths
from trilby.bench.results import OURS, RIVAL, Error
from trilby.gpt import PYTORCH

CASES = [
    AttentionCase(2, 3, 40, 16, "separate"),
    AttentionCase(2, 3, 40, 16, "packed", packed=True),
    NormCase(48, 24, "alone"),
    NormCase(48, 24, "after an add", add=True),
]
RESULTS = {
    "separate": {"output", "grad_query", "grad_key", "grad_value"},
    "packed": {"output", "grad_packed"},
    "alone": {"output", "grad_input", "grad_weight", "grad_bias"},
    "after an add": {"output", "summed", "grad_stream", "grad_branch", "grad_weight", "grad_bias"},
}


def checked(job, ours, direction):
    calls = {RIVAL: job.call(PYTORCH, direction), OURS: job.call(ours, direction)}
    return errors(job, {name: call() for name, call in calls.items()}, truths(job))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_both_directions_return_what_they_compute(case):
    job = prepare(case, torch.float32)
    forward, both = job.call(PYTORCH, "forward")(), job.call(PYTORCH, "forward+backward")()
    assert set(both) == RESULTS[case.why]
    assert set(forward) == {name for name in both if not name.startswith("grad_")}
    assert not any(tensor.requires_grad for tensor in forward.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_call_leaves_no_gradient_behind(case):
    job = prepare(case, torch.float32)
    job.call(PYTORCH, "forward+backward")()
    assert all(tensor.grad is None for tensor in job.inputs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_every_contestant_is_near_the_truth(case, dtype):
    job = prepare(case, dtype)
    for layers in contestants(compiled=False).values():
        for error in checked(job, layers, "forward+backward"):
            assert error.within_rule, error
            assert error.by[RIVAL] < 200 * torch.finfo(dtype).eps, error


def test_the_truth_is_float64_and_far_nearer_than_anyone():
    job = prepare(CASES[0], torch.float64)
    for error in checked(job, TRUTH, "forward+backward"):
        assert max(error.by.values()) < 1e-13, error


def test_the_packed_layout_is_the_separate_one_in_one_tensor():
    job = prepare(CASES[1], torch.float32)
    packed = job.inputs["packed"].detach()
    query, key, value = (part.unflatten(2, (3, 16)).transpose(1, 2) for part in packed.split(3 * 16, dim=2))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(job.call(PYTORCH, "forward")()["output"], expected)


def test_the_first_and_the_last_head_are_checked():
    case = AttentionCase(2, 5, 4, 1, "", packed=False)
    job = prepare(case, torch.float32)
    heads = torch.arange(10).view(2, 5, 1, 1).expand(2, 5, 4, 1)
    assert [int(job.pick(number, heads, "output").unique()) for number in range(job.picks)] == [0, 4, 9]


def test_a_single_head_is_checked_once():
    job = prepare(AttentionCase(1, 1, 4, 2, ""), torch.float32)
    assert job.picks == 1
    assert torch.equal(job.pick(0, job.inputs["query"], "query"), job.inputs["query"])


def test_inputs_are_the_same_in_every_run():
    first, second = prepare(CASES[2], torch.float32), prepare(CASES[2], torch.float32)
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


MUTANTS = {
    "a dropped scale": replace(PYTORCH, attention=lambda *a, **k: PYTORCH.attention(*a, **k, scale=1.0)),
    "a mask of one more": replace(
        PYTORCH,
        attention=lambda q, k, v, dropout_p, is_causal: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        ),
    ),
    "another eps": replace(PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x, s, w, b, 1e-3)),
    "a forgotten bias": replace(PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x, s, w, 0 * b, eps)),
    "bfloat16 inside": replace(
        PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x.bfloat16(), s, w.bfloat16(), b.bfloat16()).float()
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_contestant_is_caught(mutant):
    case = CASES[0] if "scale" in mutant or "mask" in mutant else CASES[2]
    assert not all(error.within_rule for error in checked(prepare(case, torch.float32), MUTANTS[mutant], "forward"))


def test_one_wrong_gradient_is_listed_first():
    def wrong_gradient(stream, branch, shape, weight, bias, eps):
        detached = stream + branch.detach() + 0.5 * (branch - branch.detach())
        return F.layer_norm(detached, shape, weight, bias, eps), detached

    wrong = replace(PYTORCH, add_layer_norm=wrong_gradient)
    worst, *_ = checked(prepare(CASES[3], torch.float32), wrong, "forward+backward")
    assert worst.result == "grad_branch"
    assert not worst.within_rule


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_or_an_infinity_is_an_infinite_error(bad):
    assert largest_difference(torch.tensor([1.0, bad]), torch.ones(2, dtype=torch.float64)) == torch.inf
    assert not Error("output", {OURS: torch.inf, RIVAL: 0.0}, 1e-7).within_rule
