"""One factory sets up every contestant; what it sets up must be the same computation, and wrong ones must be caught."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from trilby.bench.cases import AttentionCase, NormCase, VarlenCase
from trilby.bench.contestants import contestants, errors, largest_difference, prepare, truths
from trilby.bench.functions import PYTORCH, TRILBY, TRUTH
from trilby.bench.results import OURS, RIVAL, Error

CASES = [
    AttentionCase(2, 3, 40, 16, "separate"),
    AttentionCase(2, 3, 40, 16, "packed", packed=True),
    NormCase(48, 24, "alone"),
    NormCase(48, 24, "after an add", add=True),
    NormCase(48, 24, "root mean square", is_centered=False),
    NormCase(48, 24, "root mean square after an add", add=True, is_centered=False),
    AttentionCase(2, 6, 40, 16, "grouped", key_heads=2),
    AttentionCase(2, 3, 40, 16, "padded", is_causal=False, lengths=(40, 11)),
    AttentionCase(2, 3, 40, 16, "dropout", dropout_p=0.1),
    AttentionCase(2, 3, 1, 16, "one query", is_causal=False, cached=40),
    VarlenCase((5, 1, 34), 3, 16, "sequences in a row"),
]
RESULTS = {
    "packed": {"output", "grad_packed"},
    "alone": {"output", "grad_input", "grad_weight", "grad_bias"},
    "after an add": {"output", "summed", "grad_stream", "grad_branch", "grad_weight", "grad_bias"},
    "root mean square": {"output", "grad_input", "grad_weight"},
    "root mean square after an add": {"output", "summed", "grad_stream", "grad_branch", "grad_weight"},
}
OF_ATTENTION = {"output", "grad_query", "grad_key", "grad_value"}


def checked(job, ours, direction):
    calls = {RIVAL: job.call(PYTORCH, direction), OURS: job.call(ours, direction)}
    return errors(job, {name: call() for name, call in calls.items()}, truths(job))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_both_directions_return_what_they_compute(case):
    job = prepare(case, torch.float32)
    forward, both = job.call(PYTORCH, "forward")(), job.call(PYTORCH, "forward+backward")()
    assert set(both) == RESULTS.get(case.why, OF_ATTENTION)
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
    # PyTorch drops other weights than trilby: in trilby's place it would be held against trilby's truth.
    for functions in [TRILBY] if job.draws else contestants(compiled=False).values():
        for error in checked(job, functions, "forward+backward"):
            assert error.within_rule, error
            assert error.by[RIVAL] < 200 * torch.finfo(dtype).eps, error


def test_the_truth_is_float64_and_far_nearer_than_anyone():
    job = prepare(CASES[0], torch.float64)
    for error in checked(job, TRUTH, "forward+backward"):
        assert max(error.by.values()) < 1e-13, error


@pytest.mark.parametrize("why", ["dropout", "grouped", "padded", "sequences in a row"])
def test_the_truth_is_pytorchs_own_computation(why):
    (case,) = (case for case in CASES if case.why == why)
    job = prepare(case, torch.float64)
    results, truth = job.call(PYTORCH, "forward+backward")(), truths(job)[RIVAL]
    for name, result in results.items():
        for number, part in enumerate(truth):
            assert largest_difference(job.pick(number, result, name), part[name]) < 1e-12, name


def test_dropout_drops_the_same_in_every_call_and_something_at_all():
    (case,) = (case for case in CASES if case.why == "dropout")
    job, plain = prepare(case, torch.float32), prepare(replace(case, dropout_p=0.0), torch.float32)
    for functions in contestants(compiled=False).values():
        first, second = (job.call(functions, "forward")()["output"] for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.allclose(first, plain.call(functions, "forward")()["output"], atol=1e-2)


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
    "other dropped weights": replace(TRILBY, attention=lambda *a, **k: [torch.rand(1), TRILBY.attention(*a, **k)][1]),
    "a key of the padding": replace(
        PYTORCH, attention=lambda *a, attn_mask, **k: PYTORCH.attention(*a, attn_mask=attn_mask.roll(1, -1), **k)
    ),
    "sequences that see each other": replace(
        PYTORCH, packed_attention=lambda q, k, v, *_: PYTORCH.attention(q, k, v, dropout_p=0.0, is_causal=True)
    ),
    "a mean subtracted": replace(
        PYTORCH, rms_norm=lambda x, s, w, eps: F.layer_norm(x, s, w, torch.zeros_like(w), eps)
    ),
    "another eps": replace(PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x, s, w, b, 1e-3)),
    "a forgotten bias": replace(PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x, s, w, 0 * b, eps)),
    "bfloat16 inside": replace(
        PYTORCH, layer_norm=lambda x, s, w, b, eps: F.layer_norm(x.bfloat16(), s, w.bfloat16(), b.bfloat16()).float()
    ),
}


MUTATED = {
    "a dropped scale": "separate",
    "a mask of one more": "separate",
    "other dropped weights": "dropout",
    "a key of the padding": "padded",
    "sequences that see each other": "sequences in a row",
    "a mean subtracted": "root mean square",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_contestant_is_caught(mutant):
    (case,) = (case for case in CASES if case.why == MUTATED.get(mutant, "alone"))
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
