"""Attention on the CPU: exact at every edge, on every instruction-set level, forward and backward."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_case import DTYPES, Case, gradients, needs_extension, pytorch, trilby
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as, error
from torch import Tensor
from trilby.kernels import reference

# Panels hold 8, 16 or 64 queries by level, blocks 64 keys, tiles 4 panels: sizes around each, and every edge.
EDGES = {
    "one query, one key": Case(1, 1, 1, 1, 1, 8, 8),
    "one query, many keys": Case(2, 2, 2, 1, 100, 16, 16, is_causal=False),
    "many queries, one key": Case(1, 2, 2, 40, 1, 16, 16),
    "one short of a panel of 8": Case(1, 2, 2, 7, 7, 16, 16),
    "one past a panel of 8": Case(1, 2, 2, 9, 9, 16, 16),
    "one short of half a panel of 64": Case(1, 2, 2, 31, 31, 32, 32),
    "one past half a panel of 64": Case(1, 2, 2, 33, 33, 32, 32),
    "one short of a block, and of a panel of 64": Case(1, 1, 1, 63, 63, 64, 64),
    "exactly a block and a panel of 64": Case(1, 1, 1, 64, 64, 64, 64),
    "one past a block and a panel of 64": Case(1, 1, 1, 65, 65, 64, 64),
    "one past a tile of 32 or two panels of 64": Case(1, 1, 1, 129, 129, 64, 64),
    "one past a key tile of the backward": Case(1, 1, 1, 257, 257, 32, 32),
    "longer than everything": Case(1, 1, 1, 700, 700, 32, 32),
    "full, not causal": Case(1, 2, 2, 130, 130, 64, 64, is_causal=False),
    "more keys than queries": Case(1, 2, 2, 65, 130, 40, 40),
    "more queries than keys": Case(1, 2, 2, 130, 65, 40, 40),
    "more keys than queries, not causal": Case(1, 2, 2, 33, 200, 16, 16, is_causal=False),
    "head dimension 1": Case(1, 2, 2, 20, 20, 1, 1),
    "head dimension 3": Case(1, 2, 2, 20, 20, 3, 3),
    "head dimension 40": Case(1, 2, 2, 40, 40, 40, 40),
    "head dimension 80": Case(1, 2, 2, 40, 40, 80, 80),
    "head dimension 96": Case(1, 2, 2, 40, 40, 96, 96),
    "head dimension 160": Case(1, 1, 1, 40, 40, 160, 160),
    "head dimension 256": Case(1, 1, 1, 70, 70, 256, 256),
    "values wider than keys": Case(1, 2, 2, 40, 50, 16, 72),
    "values narrower than keys": Case(1, 2, 2, 40, 50, 72, 5),
    "grouped heads": Case(2, 6, 2, 70, 70, 16, 16),
    "one key head for all": Case(2, 4, 1, 70, 70, 16, 16),
    "large scale": Case(1, 2, 2, 40, 40, 16, 16, scale=50.0),
    "tiny scale": Case(1, 2, 2, 40, 40, 16, 16, scale=1e-6),
    "scale zero": Case(1, 2, 2, 40, 40, 16, 16, scale=0.0),
    "negative scale": Case(1, 2, 2, 40, 40, 16, 16, scale=-0.5),
}


def assert_exact(case: Case, inputs: tuple[Tensor, Tensor, Tensor], grad_output: Tensor) -> None:
    """Output, logsumexp and every gradient obey the rule of `tolerance`."""
    exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    truth, truth_logsumexp = reference.attention(*exact_inputs, *case.options)
    rival, ours = pytorch(*inputs, case), trilby(*inputs, case)
    assert_as_exact_as(ours, rival, truth, "output")
    logsumexp = torch.ops.trilby.attention(*inputs, *case.options)[1]
    rounded = reference.attention(*(tensor.detach().float() for tensor in inputs), *case.options)[1]
    assert_as_exact_as(logsumexp, rounded, truth_logsumexp, "logsumexp")
    for name, our_gradient, rival_gradient, true_gradient in zip(
        ("grad_query", "grad_key", "grad_value"),
        gradients(ours, inputs, grad_output),
        gradients(rival, inputs, grad_output),
        gradients(truth, exact_inputs, grad_output),
    ):
        assert_as_exact_as(our_gradient, rival_gradient, true_gradient, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_as_exact_as_pytorch_at_every_edge(case: Case, dtype: torch.dtype, level: str) -> None:
    inputs = case.inputs(dtype)
    assert_exact(case, inputs, torch.randn(case.B, case.H, case.T, case.Dv).to(dtype))


@needs_extension
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_as_exact_as_pytorch_at_random_sizes(data: st.DataObject) -> None:
    key_heads = data.draw(st.integers(1, 3))
    case = Case(
        B=data.draw(st.integers(1, 2)),
        H=key_heads * data.draw(st.integers(1, 3)),
        Hkv=key_heads,
        T=data.draw(st.integers(1, 150)),
        S=data.draw(st.integers(1, 150)),
        D=(width := data.draw(st.integers(1, 100))),
        Dv=width,
        is_causal=data.draw(st.booleans()),
    )
    torch.manual_seed(data.draw(st.integers(0, 10)))
    dtype = data.draw(st.sampled_from(DTYPES))
    assert_exact(case, case.inputs(dtype), torch.randn(case.B, case.H, case.T, case.Dv).to(dtype))


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    B, H, T, D = tensor.shape
    match layout:
        case "heads inside":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        case "slice of a wider row":
            return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., :D]
        case "every second column":
            return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]
        case "columns outside":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        case "offset by one element":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(B, H, T, D)
    raise ValueError(layout)


LAYOUTS = (
    "heads inside",
    "slice of a wider row",
    "every second column",
    "columns outside",
    "offset by one element",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit(layout: str, dtype: torch.dtype, level: str) -> None:
    case = Case(2, 3, 3, 37, 37, 24, 24)
    plain = case.inputs(dtype)
    grad_output = torch.randn(2, 3, 37, 24).to(dtype)
    expected = trilby(*plain, case)
    inputs = tuple(strided(tensor.detach(), layout).requires_grad_() for tensor in plain)
    assert all(torch.equal(a, b) and a.stride() != b.stride() for a, b in zip(inputs, plain)) or "offset" in layout
    output = trilby(*inputs, case)
    assert torch.equal(output, expected)
    for ours, theirs in zip(
        gradients(output, inputs, strided(grad_output, layout)), gradients(expected, plain, grad_output)
    ):
        assert torch.equal(ours, theirs)


def test_one_tensor_of_query_key_and_value_is_read_in_place(level: str) -> None:
    case = Case(2, 4, 4, 33, 33, 16, 16)
    joint = torch.randn(2, 33, 3 * 64, requires_grad=True)
    query, key, value = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in joint.split(64, -1))
    separate = tuple(part.detach().clone().requires_grad_() for part in (query, key, value))
    output = trilby(query, key, value, case)
    assert torch.equal(output, trilby(*separate, case))
    (joint_gradient,) = torch.autograd.grad(output.sum(), joint)
    parts = torch.autograd.grad(trilby(*separate, case).sum(), separate)
    assert torch.equal(joint_gradient, torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1))


def test_the_broadcast_gradient_of_a_sum_is_read_at_stride_zero(level: str) -> None:
    case = Case(1, 2, 2, 40, 40, 16, 16)
    inputs = case.inputs(torch.float32)
    broadcast = torch.ones(()).expand(1, 2, 40, 16)
    for ours, theirs in zip(
        gradients(trilby(*inputs, case), inputs, broadcast),
        gradients(trilby(*inputs, case), inputs, broadcast.contiguous()),
    ):
        assert torch.equal(ours, theirs)


def test_output_is_laid_out_for_the_projection_that_follows(level: str) -> None:
    case = Case(2, 3, 3, 5, 5, 8, 8)
    output = trilby(*case.inputs(torch.float32), case)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("is_causal", [True, False])
def test_hidden_keys_and_values_cannot_leak_whatever_they_hold(is_causal: bool, level: str) -> None:
    """Query i sees keys 0..i: poison key 40 and 41, and queries before 40 must not change, nor their gradients."""
    case = Case(1, 2, 2, 48, 48, 16, 16, is_causal=is_causal)
    query, key, value = (tensor.detach() for tensor in case.inputs(torch.float32))
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :, 40:42] = torch.nan
    poisoned_value[:, :, 40:42] = torch.inf
    clean = query.clone().requires_grad_(), key, value
    poisoned = query.clone().requires_grad_(), poisoned_key, poisoned_value
    grad_output = torch.randn(1, 2, 48, 16)
    grad_output[:, :, 40:] = 0
    expected, output = trilby(*clean, case), trilby(*poisoned, case)
    seen = 40 if is_causal else 0
    assert torch.equal(output[:, :, :seen], expected[:, :, :seen])
    assert output[:, :, seen:][..., 0].isnan().any()
    (clean_gradient,) = torch.autograd.grad(expected, clean[0], grad_output)
    (gradient,) = torch.autograd.grad(output, poisoned[0], grad_output)
    assert torch.equal(gradient[:, :, :seen], clean_gradient[:, :, :seen])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_propagate_as_in_pytorch(where: str, bad: float, level: str) -> None:
    """To every query that sees them, and to no other: PyTorch multiplies hidden values by 0, and 0 · NaN is NaN."""
    case = Case(1, 1, 1, 20, 20, 8, 8)
    inputs = dict(zip(("query", "key", "value"), (tensor.detach() for tensor in case.inputs(torch.float32))))
    inputs[where][0, 0, 7, 3] = bad
    ours, theirs = trilby(*inputs.values(), case), pytorch(*(tensor.double() for tensor in inputs.values()), case)
    assert ours[:, :, :7].isfinite().all()
    assert not ours[:, :, 7:].isfinite().all()
    assert torch.equal(ours[:, :, 7:].isnan(), theirs[:, :, 7:].isnan())
    assert error(ours[:, :, 7:], theirs[:, :, 7:]) < torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_a_hundred_thousand_neither_overflow_nor_vanish(dtype: torch.dtype, level: str) -> None:
    case = Case(1, 2, 2, 40, 40, 16, 16, scale=1.0)
    query, key, value = case.inputs(dtype)
    with torch.no_grad():
        query.mul_(100).round_()
        key.mul_(100).round_()
    assert_exact(case, (query, key, value), torch.randn(1, 2, 40, 16).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [3.0, 30.0, 300.0])
def test_maxima_may_rise_from_key_to_key(largest: float, dtype: torch.dtype, level: str) -> None:
    """By less and by more than what probabilities may exceed 1 by, within a block of keys and from block to block."""
    case = Case(1, 2, 2, 40, 600, 16, 16, is_causal=False, scale=1.0)
    query, key, value = case.inputs(dtype)
    with torch.no_grad():
        key.mul_(torch.linspace(0.0, largest, 600)[:, None].to(dtype))
    assert_exact(case, (query, key, value), torch.randn(1, 2, 40, 16).to(dtype))


def test_a_query_without_keys_gives_zero_and_minus_infinity(level: str) -> None:
    query, value = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 0, 8)
    output, logsumexp = torch.ops.trilby.attention(query, value, value, *reference.AttentionOptions.plain(False, 1.0))
    assert torch.equal(output, torch.zeros(1, 1, 4, 8))
    assert torch.equal(logsumexp, torch.full((1, 1, 4), -torch.inf))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5, 8), (2, 0, 5, 5, 8), (2, 2, 0, 5, 8)])
def test_empty_batches_give_empty_results(sizes: tuple[int, ...], level: str) -> None:
    B, H, T, S, D = sizes
    inputs = Case(B, H, H, T, S, D, D).inputs(torch.float32)
    output = torch.ops.trilby.attention(*inputs, *reference.AttentionOptions.plain(True, 1.0))[0]
    assert output.shape == (B, H, T, D)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(1, 1, 1, 300, 300, 32, 32), Case(1, 3, 3, 200, 200, 64, 64), Case(1, 4, 2, 300, 100, 16, 16)],
    ids=["one head: two passes", "an odd number of heads", "grouped heads"],
)
@pytest.mark.usefixtures("threads")
def test_every_number_of_threads_gives_the_same_bits(case: Case, dtype: torch.dtype, level: str) -> None:
    inputs = case.inputs(dtype)
    grad_output = torch.randn(case.B, case.H, case.T, case.Dv).to(dtype)
    results = []
    for threads in (1, 2, 4, 2, 8):
        torch.set_num_threads(threads)
        output = trilby(*inputs, case)
        results.append((output, *gradients(output, inputs, grad_output)))
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later))


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_thirty_runs_give_the_same_bits(level: str) -> None:
    case = Case(2, 3, 3, 239, 239, 64, 64)
    inputs = case.inputs(torch.bfloat16)
    grad_output = torch.randn(2, 3, 239, 64).to(torch.bfloat16)
    first = None
    for run in range(30):
        torch.set_num_threads((1, 2, 4)[run % 3])
        output = trilby(*inputs, case)
        result = (output, *gradients(output, inputs, grad_output))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result))


def test_a_row_of_the_batch_does_not_depend_on_the_others(level: str) -> None:
    case = Case(3, 2, 2, 50, 50, 16, 16)
    query, key, value = case.inputs(torch.float32)
    whole = trilby(query, key, value, case)
    assert torch.equal(whole[1:2], trilby(query[1:2], key[1:2], value[1:2], case))


def test_inputs_are_left_as_they_were(level: str) -> None:
    case = Case(1, 2, 2, 50, 50, 16, 16)
    inputs = case.inputs(torch.float32)
    grad_output = torch.randn(1, 2, 50, 16)
    copies = [tensor.detach().clone() for tensor in (*inputs, grad_output)]
    gradients(trilby(*inputs, case), inputs, grad_output)
    assert all(torch.equal(now, before) for now, before in zip((*inputs, grad_output), copies))


def test_backward_twice_gives_the_same_gradients(level: str) -> None:
    case = Case(1, 2, 2, 50, 50, 16, 16)
    inputs = case.inputs(torch.float32)
    output = trilby(*inputs, case)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_gradient_penalty_equals_pytorchs_math(level: str) -> None:
    case = Case(1, 2, 2, 40, 40, 16, 16)
    inputs = case.inputs(torch.float32)

    def penalty(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*inputs, case).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = penalty(pytorch)
    for ours, theirs in zip(penalty(trilby), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@needs_extension
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key": torch.randn(1, 2, 5, 9)}, "sizes of query, key and value do not agree"),
        ({"key": torch.randn(1, 2, 5, 8, 1)}, "query, key and value must be"),
        ({"key": torch.randn(1, 2, 5, 8).bfloat16()}, "query, key and value must have one dtype"),
        ({"query": torch.randn(1, 3, 4, 8), "output": torch.randn(1, 3, 4, 8)}, "not a multiple of key's 2"),
        ({"grad_output": torch.randn(1, 2, 4, 7)}, "grad_output must be"),
        ({"grad_output": torch.randn(1, 2, 4, 8).bfloat16()}, "grad_output must have query's dtype"),
        ({"output": torch.randn(1, 2, 3, 8)}, "output must be"),
        ({"logsumexp": torch.randn(1, 2, 3)}, "logsumexp must be"),
        ({"logsumexp": torch.randn(1, 2, 4).double()}, "logsumexp must be"),
    ],
)
def test_what_would_be_read_outside_is_refused_by_name(wrong: dict[str, Tensor], message: str) -> None:
    right = {"grad_output": torch.randn(1, 2, 4, 8), "query": torch.randn(1, 2, 4, 8)}
    right |= {"key": torch.randn(1, 2, 5, 8), "value": torch.randn(1, 2, 5, 8)}
    right |= {"output": torch.randn(1, 2, 4, 8), "logsumexp": torch.randn(1, 2, 4)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.trilby.attention_backward(*(right | wrong).values(), *reference.AttentionOptions.plain(True, 1.0))


class TestMutants:
    """Kernels with one mistake each: if the rule lets one pass, it proves nothing."""

    CASE = Case(1, 2, 2, 70, 70, 32, 32)

    def judge(self, query: Tensor, key: Tensor, value: Tensor, mutant: Tensor) -> None:
        truth = reference.attention(query.double(), key.double(), value.double(), *self.CASE.options)[0]
        assert_as_exact_as(mutant, pytorch(query, key, value, self.CASE), truth, "mutant")

    def test_the_scale_dropped(self) -> None:
        inputs = self.CASE.inputs(torch.float32)
        with pytest.raises(AssertionError, match="mutant: error"):
            self.judge(*inputs, torch.ops.trilby.attention(*inputs, *reference.AttentionOptions.plain(True, 1.0))[0])

    def test_the_mask_shifted_by_one(self) -> None:
        query, key, value = self.CASE.inputs(torch.float32)
        seen = torch.ones(70, 70, dtype=torch.bool).tril(1)
        mutant = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        with pytest.raises(AssertionError, match="mutant: error"):
            self.judge(query, key, value, mutant)

    def test_the_mask_dropped(self) -> None:
        inputs = self.CASE.inputs(torch.float32)
        with pytest.raises(AssertionError, match="mutant: error"):
            self.judge(*inputs, trilby(*inputs, replace(self.CASE, is_causal=False)))

    def test_float32_inputs_multiplied_in_bfloat16(self) -> None:
        inputs = self.CASE.inputs(torch.float32)
        halves = tuple(tensor.bfloat16() for tensor in inputs)
        mutant = torch.ops.trilby.attention(*halves, *self.CASE.options)[0].float()
        with pytest.raises(AssertionError, match="mutant: error"):
            self.judge(*inputs, mutant)

    def test_one_key_in_seventy_skipped(self) -> None:
        query, key, value = self.CASE.inputs(torch.float32)
        seen = torch.ones(70, 70, dtype=torch.bool).tril()
        seen[69, 13] = False
        mutant = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        with pytest.raises(AssertionError, match="mutant: error"):
            self.judge(query, key, value, mutant)
