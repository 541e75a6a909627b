"""In PyTorch's place trilby is as exact as PyTorch, keeps its operators' promises, and hands on the rest."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from activation import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    heads_inside,
    with_gradients,
)
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import (
    activate,
    activated,
    attention_rules,
    explain,
    reference,
    restore,
)
from trilby.kernels.attention_arguments import AttentionArguments
from trilby.kernels.attention_rules import FEW_KEYS, FEWEST_IN_PLACE, LARGEST_HEAD_DIM
from trilby.kernels.ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to activate: {NATIVE.reason}")
aten = torch.ops.aten


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_as_exact_as_pytorchs(level, dtype, layout, is_causal):
    inputs = tuple(layout(2, 4, 100, 32, dtype) for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def meaning(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.attention(query, key, value, *reference.AttentionOptions.plain(is_causal, 32**-0.5))[0]

    assert_exact(attend, meaning, inputs)


def test_grouped_heads_a_scale_and_more_keys_than_queries(level):
    query = heads_inside(2, 6, 70, 32, torch.float32)
    key, value = (heads_inside(2, 2, 130, 32, torch.float32) for _ in range(2))
    assert_exact(
        lambda *inputs: F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True),
        lambda *inputs: reference.attention(*inputs, *reference.AttentionOptions.plain(True, 0.3))[0],
        (query, key, value),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["none", "weight", "weight and bias", "float32 weight and bias"])
@pytest.mark.parametrize("shape", [(2, 8), (3, 5, 768), (64, 7, 40)], ids=str)
def test_layer_norm_is_as_exact_as_pytorchs(level, dtype, parameters, shape):
    parameter_dtype = torch.float32 if "float32" in parameters else dtype
    count = {"none": 0, "weight": 1}.get(parameters, 2)
    inputs = [torch.randn(shape).to(dtype), *(torch.randn(shape[-1]).to(parameter_dtype) for _ in range(count))]

    def normalize(input: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(input, shape[-1:], *affine)

    assert_exact(normalize, normalize, tuple(inputs))


def test_layer_norm_over_two_dimensions_of_a_transposed_input(level):
    inputs = (torch.randn(6, 9, 4, 10).transpose(0, 1), torch.randn(4, 10), torch.randn(10, 4).t())
    assert_exact(lambda x, w, b: F.layer_norm(x, (4, 10), w, b), lambda x, w, b: F.layer_norm(x, (4, 10), w, b), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "weight and bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(dtype, frozen):
    sizes = {"input": (30, 64), "weight": (64,), "bias": (64,)}
    tensors = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}

    def gradients(dtype: torch.dtype) -> dict[str, Tensor | None]:
        leaves = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen)
        output = F.layer_norm(leaves["input"], (64,), leaves["weight"], leaves["bias"])
        output.backward(tensors["input"].flip(0).to(dtype))
        return {name: leaf.grad for name, leaf in leaves.items()}

    rivals, truths = gradients(dtype), gradients(torch.float64)
    with activated():
        ours = gradients(dtype)
    for name, gradient in ours.items():
        assert (gradient is None) == (name in frozen)
        if gradient is not None:
            assert_as_exact_as(gradient, rivals[name], truths[name], name)


@pytest.mark.parametrize("affine", ["none", "weight", "weight and bias"])
def test_forward_and_backward_are_trilbys_kernels(affine):
    inputs = tuple(heads_inside(2, 4, 100, 32, torch.float32).requires_grad_() for _ in range(3))
    parameters = [torch.ones(32, requires_grad=True) for name in ("weight", "bias") if name in affine]
    with activated():
        before = torch.ops.trilby.served_calls()
        F.layer_norm(F.scaled_dot_product_attention(*inputs), (32,), *parameters).sum().backward()
        after = torch.ops.trilby.served_calls()
    assert [b - a for a, b in zip(before, after)] == [1, 1, 1, 1, 0]


# ---- what PyTorch's operators promise --------------------------------------------------------------------------------


def description(results: tuple[Tensor | None, ...]) -> list[tuple]:
    """All of results but their numbers."""
    return [() if r is None else (r.shape, r.stride(), r.dtype, r.requires_grad, r.is_inference()) for r in results]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_of_the_attention_operators_are_laid_out_as_pytorchs(dtype, layout):
    query, key, value = (layout(2, 4, 100, 32, dtype) for _ in range(3))

    def run() -> list[tuple]:
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.randn_like(output), query, key, value, output, logsumexp, 0.0, True
        )
        return description((output, logsumexp, *gradients))

    expected = run()
    with activated():
        assert run() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "input's"], ids=str)
def test_results_of_the_norm_operators_are_laid_out_as_pytorchs(dtype, mask, parameters, parameter_dtype):
    parameter = torch.randn(4, 10).to(dtype if parameter_dtype == "input's" else parameter_dtype)
    weight = parameter if parameters in ("weight", "both") else None
    bias = parameter if parameters in ("bias", "both") else None
    if (weight is None and mask[1]) or (bias is None and mask[2]):
        return  # nobody asks for the gradient of what is not there
    if parameters == "bias" and parameter.dtype != dtype:
        return  # PyTorch's kernel has no backward for it, and it is PyTorch's to compute
    stream = torch.randn(6, 9, 4, 10).to(dtype).transpose(0, 1)

    def run() -> list[tuple]:
        output, mean, rstd = aten.native_layer_norm(stream, (4, 10), weight, bias, 1e-5)
        gradients = aten.native_layer_norm_backward(
            torch.randn_like(output), stream, (4, 10), mean, rstd, weight, bias, mask
        )
        return description((output, mean, rstd, *gradients))

    expected = run()
    with activated():
        assert run() == expected


def test_a_forward_of_pytorchs_may_have_a_backward_of_trilbys_and_the_other_way_round():
    inputs = tuple(heads_inside(2, 4, 100, 32, torch.float32).requires_grad_() for _ in range(3))

    def both(forward: Callable[[], None], backward: Callable[[], None]) -> tuple[Tensor, ...]:
        forward()
        output = F.layer_norm(F.scaled_dot_product_attention(*inputs, is_causal=True), (32,))
        backward()
        return torch.autograd.grad(output.square().sum(), inputs)

    expected = both(restore, restore)
    for forward, backward in ((activate, restore), (restore, activate)):
        for ours, theirs in zip(both(forward, backward), expected):
            torch.testing.assert_close(ours, theirs)


# ---- handing on ------------------------------------------------------------------------------------------------------


COVERED = (2, 4, 128, 32)
# Queries and keys around each limit, and a large head.
SIZES = sorted(
    {
        (fewest - less, keys)
        for limits in FEWEST_IN_PLACE.values()
        for keys, fewest in zip((FEW_KEYS, 2048), limits)
        for less in (0, 1)
    }
    | {(1, 8), (1, 4096), (8, FEW_KEYS + 1)}
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("D", [32, LARGEST_HEAD_DIM, LARGEST_HEAD_DIM + 1])
def test_attention_is_trilbys_by_the_limits_that_are_named(dtype, size, D):
    T, S = size
    query, key = torch.zeros(1, 2, T, D, dtype=dtype), torch.zeros(1, 2, S, D, dtype=dtype)
    call = AttentionArguments(query, key, key).call._replace(in_place=True)
    inferred, trained = (not attention_rules.reasons_for_pytorch(call._replace(trains=t)) for t in (False, True))
    assert inferred or not trained  # a compiled forward is computed as in inference
    query.requires_grad_()
    with activated():
        counts = [torch.ops.trilby.served_calls()[:2]]
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, key)
        counts.append(torch.ops.trilby.served_calls()[:2])
        F.scaled_dot_product_attention(query, key, key).sum().backward()
        counts.append(torch.ops.trilby.served_calls()[:2])
    assert [[b > a for a, b in zip(*pair)] for pair in pairwise(counts)] == [[inferred, False], [trained] * 2]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 2048), (5, 2048), (8, 24), (9, 40), (20, 32), (31, 64)], ids=str)
def test_forward_and_backward_come_from_one_side_at_extreme_scores(dtype, size, compiled):
    """Scores of 10^5 are rounded by hundredths: only with the logsumexp of its own scores is a backward exact."""
    T, S = size
    inputs = 40 * torch.randn(4, 12, T, 64), 300 * torch.randn(4, 12, S, 64), torch.randn(4, 12, S, 64)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    torch._dynamo.reset()
    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    assert_exact(run, attend, tuple(tensor.to(dtype) for tensor in inputs))


@torch.no_grad()
def test_a_backward_of_pytorchs_is_given_a_forward_of_pytorchs():
    """Such a backward is computed from the bits that PyTorch's forward would have left."""
    query, key, value = torch.randn(1, 12, 4, 64), torch.randn(1, 12, 2048, 64), torch.randn(1, 12, 2048, 64)
    gradient = torch.randn_like(query)

    def backward(forward: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, *forward, 0.0, False
        )

    theirs = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    expected = backward(theirs)
    with activated():
        before = torch.ops.trilby.served_calls()
        ours = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        found = backward(ours)
        served = [b - a for a, b in zip(before, torch.ops.trilby.served_calls())]
    assert served == [1, 0, 0, 0, 0]
    assert not torch.equal(ours[0], theirs[0])
    for our, their in zip(found, expected):
        assert torch.equal(our, their)


def test_tiny_calls_are_as_exact_as_pytorchs():
    for dtype in DTYPES:
        inputs = tuple(heads_inside(2, 3, 8, 16, dtype) for _ in range(3))
        with activated(), torch.no_grad():
            assert explain(F.scaled_dot_product_attention, *inputs)[0].is_trilbys
        assert_exact(F.scaled_dot_product_attention, F.scaled_dot_product_attention, inputs)


def test_the_limits_are_seen_in_the_bits():
    """So the test above can fail: trilby's result and PyTorch's are two."""
    query, key, value = (torch.randn(COVERED) for _ in range(3))
    theirs = F.scaled_dot_product_attention(query, key, value)
    with activated():
        assert not torch.equal(F.scaled_dot_product_attention(query, key, value), theirs)


# ---- masks -----------------------------------------------------------------------------------------------------------


def seen(*shape: int) -> Tensor:
    """A mask whose fourth row sees nothing, and the last one not the first key."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., -1, 0] = True
    hidden[..., min(3, shape[-2] - 1), :] |= shape[-2] > 1
    return ~hidden


MASKS = {
    "for all": seen(100, 100),
    "of each batch": seen(2, 1, 100, 100),
    "of each head": seen(1, 4, 100, 100),
    "of keys": seen(2, 1, 1, 100),
    "of queries": seen(100, 1),
}


@pytest.fixture
def small_masks(monkeypatch):
    """No masked call is too small for trilby."""
    monkeypatch.setattr(attention_rules, "FEWEST_MASKED_MULTIPLICATIONS", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["seen or not", "added", "added in float32"])
def test_masked_attention_is_as_exact_as_pytorchs(small_masks, dtype, mask, kind):
    inputs = tuple(heads_inside(2, 4, 100, 32, dtype) for _ in range(3))
    if kind != "seen or not":
        added = torch.randn(mask.shape).to(dtype if kind == "added" else torch.float32)
        mask = added.masked_fill(~mask, -torch.inf)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = mask.double() if query.dtype == torch.float64 and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=given)

    with activated():
        assert all(call.is_trilbys for call in explain(with_gradients, attend, *inputs))
    assert_exact(attend, attend, inputs)


def test_the_limit_of_masked_attention_is_the_one_that_is_named():
    fewest = attention_rules.FEWEST_MASKED_MULTIPLICATIONS
    for length, expected in ((fewest // 64**2 - 1, False), (-(-fewest // 64**2), True)):
        query, key = torch.randn(1, 1, 64, 64), torch.randn(1, 1, length, 64)
        with activated():
            mask = torch.ones(64, length, dtype=torch.bool).tril()
            (found,) = explain(F.scaled_dot_product_attention, query, key, key, attn_mask=mask)
            assert found.is_trilbys == expected == (not found.reasons)


ODD_INPUTS = {
    "float64": tuple(torch.randn(COVERED, dtype=torch.float64) for _ in range(3)),
    "few queries": (torch.randn(2, 4, 9, 16), *(torch.randn(2, 4, 40, 16) for _ in range(2))),
    "no query": (torch.randn(2, 4, 0, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)),
    "three dimensions": tuple(torch.randn(4, 128, 32) for _ in range(3)),
    "broadcast batch": (torch.randn(COVERED), torch.randn(1, 4, 128, 32), torch.randn(1, 4, 128, 32)),
}


@pytest.mark.parametrize("inputs", ODD_INPUTS.values(), ids=ODD_INPUTS)
def test_attention_that_is_not_covered_is_pytorchs_bit_by_bit(inputs):
    expected = with_gradients(F.scaled_dot_product_attention, *inputs)
    with activated():
        for ours, theirs in zip(with_gradients(F.scaled_dot_product_attention, *inputs), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_norms_that_are_not_covered_are_pytorchs_bit_by_bit(shape, dtype):
    shape = shape if dtype is torch.float32 else (30, 64)
    inputs = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    expected = with_gradients(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b), *inputs)
    with activated():
        for ours, theirs in zip(with_gradients(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b), *inputs), expected):
            assert torch.equal(ours, theirs)


REFUSED = {
    "a norm of another size": lambda: F.layer_norm(torch.randn(2, 3), (4,)),
    "a weight of another size": lambda: aten.native_layer_norm(torch.randn(2, 3), (3,), torch.randn(4), None, 1e-5),
    "no dimension": lambda: F.layer_norm(torch.randn(2, 3), ()),
    "integers": lambda: F.layer_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "mixed dtypes": lambda: F.layer_norm(torch.randn(2, 3), (3,), torch.randn(3).bfloat16()),
    "weight and bias of two dtypes": lambda: F.layer_norm(
        torch.randn(2, 3).bfloat16(), (3,), torch.randn(3), torch.randn(3).bfloat16()
    ),
    "dropout inside the operator": lambda: aten._scaled_dot_product_flash_attention_for_cpu(
        *(torch.randn(COVERED) for _ in range(3)), 0.5
    ),
    "query of other dtype": lambda: F.scaled_dot_product_attention(
        torch.randn(COVERED).bfloat16(), torch.randn(COVERED), torch.randn(COVERED)
    ),
    "keys of another size": lambda: F.scaled_dot_product_attention(
        torch.randn(COVERED), torch.randn(2, 4, 128, 33), torch.randn(COVERED)
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_pytorch_refuses_is_refused_in_its_words(call):
    with pytest.raises(RuntimeError) as theirs:
        call()
    with activated(), pytest.raises(RuntimeError) as ours:
        call()
    # Where its kernel in C++ refuses, a torch before 2.13 prints its words and does not hand them on.
    unsaid = "PyTorch's kernel refused the call" if torch.__version__ < "2.13" else str(theirs.value)
    assert str(theirs.value) in str(ours.value) or unsaid in str(ours.value)
