"""Products of bfloat16 that are widened: PyTorch's results, dtypes and gradients, at least as exact; and where not."""

import pytest
import torch
from tolerance import assert_as_exact_as
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import linear, wide_product
from trilby.kernels.wide_product import FEWEST_ROWS

ROWS = FEWEST_ROWS


@pytest.fixture(autouse=True)
def slow(monkeypatch) -> None:
    """Bfloat16 is slow, whatever this processor is."""
    monkeypatch.setattr(wide_product, "BFLOAT16_IS_SLOW", True)


def draw(*sizes: int, weight: torch.dtype, input: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Input [..., K], weight [N, K] and bias [N]."""
    *rows, N, K = sizes
    tensors = torch.randn(*rows, K, dtype=input), torch.randn(N, K, dtype=weight), torch.randn(N, dtype=weight)
    return tuple(tensor.requires_grad_() for tensor in tensors)


def results(function, operands: tuple[Tensor, ...], autocast: bool) -> list[Tensor]:
    """Output and gradients of all operands."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = function(*operands)
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, operands, grad)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("weight", "input", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [(ROWS,), (2, ROWS), (3, 1, ROWS)], ids=str)
def test_it_is_as_exact_as_pytorchs(rows, weight, input, autocast, has_bias):
    operands = draw(*rows, 24, 40, weight=weight, input=input)[: 2 + has_bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert wide_product._is_widened(*operands[:2])
    ours, rivals = (results(function, operands, autocast) for function in (linear, F.linear))
    exact = tuple(operand.detach().bfloat16().double().requires_grad_() for operand in operands)
    # Weights in float32 are not rounded here, and are in PyTorch: each is held against the truth of its own operands.
    if weight == torch.float32:
        exact = (exact[0], *(operand.detach().double().requires_grad_() for operand in operands[1:]))
    for name, one, other, truth in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), ours, rivals, results(F.linear, exact, False)
    ):
        assert one.dtype == other.dtype
        assert_as_exact_as(one, other, truth, name)


def test_what_is_kept_for_the_backward_is_not_widened():
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        linear(*draw(ROWS, 24, 40, weight=torch.bfloat16, input=torch.bfloat16))
    assert kept == [torch.bfloat16] * 2


def test_it_is_differentiated_twice():
    operands = draw(ROWS, 3, 4, weight=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(*operands)
    (first,) = torch.autograd.grad(output.float().square().sum(), operands[0], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), operands[1])
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(F.linear(*operands).square().sum(), operands[0], create_graph=True)[0].sum(), operands[1]
    )
    torch.testing.assert_close(second, expected, rtol=0.05, atol=0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what Dynamo does with nodes
def test_compiled_it_gives_the_same_bits():
    operands = draw(ROWS, 24, 40, weight=torch.float32)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(linear, operands, True), results(compiled, operands, True)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("operands", "autocast"),
    [
        (draw(ROWS, 24, 40, weight=torch.float32), None),
        (draw(ROWS, 24, 40, weight=torch.float32), torch.float16),
        (draw(ROWS, 24, 40, weight=torch.float64, input=torch.float64), torch.bfloat16),
        (draw(24, 40, weight=torch.float32), torch.bfloat16),
        (draw(ROWS - 1, 24, 40, weight=torch.bfloat16, input=torch.bfloat16), None),
    ],
    ids=["float32", "autocast to float16", "float64", "one row", "few rows of wide weights"],
)
def test_what_is_not_widened_is_pytorchs(operands, autocast):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert not wide_product._is_widened(*operands[:2])
        assert torch.equal(wide_product.linear(*operands), F.linear(*operands))


def test_transforms_are_pytorchs():
    operands = [operand.detach() for operand in draw(4, ROWS, 24, 40, weight=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, pytorchs = (torch.vmap(f, (0, None, None))(*operands) for f in (linear, F.linear))
    assert torch.equal(ours, pytorchs)


def test_where_bfloat16_is_fast_it_is_not_widened(monkeypatch):
    monkeypatch.setattr(wide_product, "BFLOAT16_IS_SLOW", False)
    operands = draw(ROWS, 24, 40, weight=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide_product.linear(*operands), F.linear(*operands))
