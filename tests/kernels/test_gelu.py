"""GELU: as exact as PyTorch's at every edge, on every level, both ways, and PyTorch's where that is faster."""

import math

import pytest
import torch
from attention_case import DTYPES, needs_extension
from tolerance import assert_as_exact_as
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import activation, gelu, reference
from trilby.kernels.activation import FEWEST_ELEMENTS, gelu_reasons_for_pytorch

# Registers of 4 to 16 lanes and what is left of them, tasks of 8192 elements.
COUNTS = (0, 1, 3, 15, 16, 17, 100, 8191, 8192, 8193, 3 * 8192 + 5)
SPECIAL = [0.0, -0.0, 1e-38, -1e-30, 1e-4, -1e-4, 3.0, -3.0, 5.0, -5.0, 9.0, -9.0, 80.0, -80.0, 1e4, -1e4, math.inf]


def with_gradient(function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = function(x)
    return output.detach(), torch.autograd.grad(output, x, grad)[0]


def rival(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def assert_exact(x: Tensor, grad: Tensor, function=torch.ops.trilby.gelu) -> None:
    ours, theirs = with_gradient(function, x, grad), with_gradient(rival, x, grad)
    truth = with_gradient(rival, x.double(), grad.double())
    for what, *three in zip(("output", "gradient"), ours, theirs, truth):
        assert_as_exact_as(*three, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_as_exact_as_pytorch_at_every_edge(count: int, dtype: torch.dtype, level: str) -> None:
    assert_exact(3 * torch.randn(count).to(dtype), torch.randn(count).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_numbers(dtype: torch.dtype, level: str) -> None:
    x = torch.tensor(SPECIAL).to(dtype)
    assert_exact(x, torch.ones_like(x))


def test_a_nan_stays_one(level: str) -> None:
    x = torch.tensor([math.nan, 1.0])
    output, gradient = with_gradient(torch.ops.trilby.gelu, x, torch.ones(2))
    assert output.isnan().tolist() == gradient.isnan().tolist() == [True, False]


def test_any_size_and_any_strides_of_the_gradient(level: str) -> None:
    x = torch.randn(6, 5, 4)
    assert_exact(x, torch.randn(4, 5, 6).transpose(0, 2))
    assert_exact(x, torch.ones(()).expand(6, 5, 4))
    assert_exact(torch.randn(4, 5, 6).transpose(0, 2), torch.randn(6, 5, 4))


@needs_extension
def test_the_same_bits_for_any_number_of_threads() -> None:
    x, grad, threads = torch.randn(50_000), torch.randn(50_000), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(with_gradient(torch.ops.trilby.gelu, x, grad))
    torch.set_num_threads(threads)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_the_operator_is_one() -> None:
    x = torch.randn(33, requires_grad=True)
    torch.library.opcheck(torch.ops.trilby.gelu.default, (x,))
    torch.library.opcheck(torch.ops.trilby.gelu_backward.default, (torch.randn(33), torch.randn(33)))


def test_its_gradient_can_be_differentiated() -> None:
    x = torch.randn(FEWEST_ELEMENTS, requires_grad=True)
    (ours,) = torch.autograd.grad(gelu(x, "tanh").sum(), x, create_graph=True)
    (theirs,) = torch.autograd.grad(rival(x).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0])


MUTANTS = {
    "another cubic term": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.0447 * x**3)),
    "the exact form": F.gelu,
    "the quick form": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_function_is_noticed(mutant: str) -> None:
    with pytest.raises(AssertionError, match="output: error"):
        assert_exact(3 * torch.randn(1000), torch.randn(1000), MUTANTS[mutant])


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.zeros(FEWEST_ELEMENTS),), "approximate is 'none'"),
        ((torch.zeros(FEWEST_ELEMENTS, dtype=torch.float64), "tanh"), "dtype is torch.float64"),
        ((torch.zeros(2, FEWEST_ELEMENTS).T, "tanh"), "input is not contiguous"),
        ((torch.zeros(FEWEST_ELEMENTS - 1), "tanh"), "fewer than"),
    ],
)
def test_what_is_pytorchs_has_a_reason(arguments, reason: str) -> None:
    assert any(reason in each for each in gelu_reasons_for_pytorch(*arguments))
    assert torch.equal(gelu(*arguments), F.gelu(arguments[0], approximate=(*arguments, "none")[1]))


@needs_extension
def test_on_another_device_it_is_pytorchs() -> None:
    x = torch.zeros(FEWEST_ELEMENTS, device="meta")
    assert "input is on meta" in gelu_reasons_for_pytorch(x, "tanh")[0]
    assert gelu(x, "tanh").is_meta


@needs_extension
def test_what_is_trilbys_has_none(monkeypatch) -> None:
    assert not gelu_reasons_for_pytorch(torch.zeros(FEWEST_ELEMENTS), "tanh")
    monkeypatch.setattr(activation, "_gelu", lambda x: "trilby's")
    assert gelu(torch.zeros(FEWEST_ELEMENTS), approximate="tanh") == "trilby's"


@pytest.mark.parametrize("approximate", ["tahn", 3])
def test_errors_are_pytorchs(approximate) -> None:
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.gelu(torch.zeros(3), approximate=approximate)
    with pytest.raises(theirs.type):
        gelu(torch.zeros(3), approximate=approximate)


def test_the_reference_means_the_same() -> None:
    x, grad = torch.randn(1000).double(), torch.randn(1000).double()
    output, gradient = with_gradient(rival, x, grad)
    torch.testing.assert_close(reference.gelu(x), output, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reference.gelu_backward(grad, x), gradient, rtol=1e-12, atol=1e-14)
