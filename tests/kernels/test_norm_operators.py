"""The operators behind the norms: what torch asks of them, compilation, second derivatives, and what is caught."""

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_as_exact_as
from torch import Tensor
from torch.nn import functional as F
from trilby.kernels import add_layer_norm, layer_norm, reference, rms_norm
from trilby.kernels.ops import NATIVE

needs_kernels = pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.reason or "loaded")
ROWS, WIDTH = 2048, 768  # trilby's own, not PyTorch's: large enough for either dtype


def _leaves(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, requires_grad=True) for size in sizes]


@needs_kernels
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(centered: bool, dtype: torch.dtype) -> None:
    x, y, weight, bias = (tensor.to(dtype).detach().requires_grad_() for tensor in _leaves((5, 8), (5, 8), (8,), (8,)))
    seed = torch.tensor([7])
    operators = torch.ops.trilby
    torch.library.opcheck(operators.norm.default, (x, weight, bias, 1, centered, 1e-5))
    torch.library.opcheck(operators.norm.default, (x, None, None, 1, centered, 1e-5))
    torch.library.opcheck(operators.add_norm.default, (x, y, weight, bias, seed, 1, centered, 1e-5, 0.25))
    torch.library.opcheck(operators.add_norm.default, (x, y, weight, None, None, 1, centered, 1e-5, 0.0))
    _, mean, rstd = operators.norm(x.detach(), None, None, 1, centered, 1e-5)
    given = (x.detach(), None, x.detach(), mean, rstd, weight.detach(), None, seed, 1, centered, 0.25)
    torch.library.opcheck(operators.norm_backward.default, given)


@needs_kernels
def test_operators_are_the_reference(level: str) -> None:
    x, y, weight, bias = (tensor.detach() for tensor in _leaves((40, 100), (40, 100), (100,), (100,)))
    seed = torch.tensor([-7])
    for centered in (True, False):
        arguments = (x, y, weight, bias, seed, 1, centered, 1e-5, 0.25)
        ours, meaning = torch.ops.trilby.add_norm(*arguments), reference.add_norm(*arguments)
        for a, b in zip(ours, meaning):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        gradients = (y, x, *ours[1:], weight, bias, seed, 1, centered, 0.25)
        for a, b in zip(torch.ops.trilby.norm_backward(*gradients), reference.norm_backward(*gradients)):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.ops.trilby.norm(x, None, None, 3, True, 1e-5), "normalized_dims was 3, input has 2"),
        (lambda x: torch.ops.trilby.norm(x, x[0, :7], None, 1, True, 1e-5), "weight has 7 elements"),
        (lambda x: torch.ops.trilby.norm(x.double(), None, None, 1, True, 1e-5), "must be float32"),
        (lambda x: torch.ops.trilby.norm(x[:, :0], None, None, 1, True, 1e-5), "a row of input is empty"),
        (lambda x: torch.ops.trilby.norm(x, x[0], x[0].half(), 1, True, 1e-5), "must have one dtype"),
        (lambda x: torch.ops.trilby.add_norm(x, x[:3], None, None, None, 1, True, 1e-5, 0.0), "branch must have"),
        (lambda x: torch.ops.trilby.add_norm(x, x, None, None, None, 1, True, 1e-5, 0.5), "dropout needs a seed"),
        (lambda x: torch.ops.trilby.add_norm(x, x, None, None, None, 1, True, 1e-5, 1.5), "between 0 and 1"),
        (
            lambda x: torch.ops.trilby.norm_backward(x, None, x, x[:2, 0], x[:2, 0], None, None, None, 1, True, 0.0),
            "rstd must be one float32 a row",
        ),
    ],
)
def test_operators_read_nothing_outside_their_tensors(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 8))


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("function", [layer_norm, rms_norm], ids=["layer_norm", "rms_norm"])
def test_compiled_equals_eager(function: Callable[..., Tensor]) -> None:
    x, weight = _leaves((ROWS, WIDTH), (WIDTH,))
    gradient = torch.randn(ROWS, WIDTH)
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        output = call(x, (WIDTH,), weight)
        results.append((output, *torch.autograd.grad(output, (x, weight), gradient)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_kernels
@pytest.mark.slow
def test_compiled_residual_form_equals_eager() -> None:
    leaves = _leaves((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,))
    gradients = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    results = []
    for call in (add_layer_norm, torch.compile(add_layer_norm, fullgraph=True)):
        outputs = call(leaves[0], leaves[1], (WIDTH,), *leaves[2:])
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, gradients)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_kernels
def test_second_derivatives() -> None:
    def penalty(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weight = (t.detach().to(dtype).requires_grad_() for t in leaves)
        output = function(x, (WIDTH,), weight)
        (gradient,) = torch.autograd.grad(output, x, direction.to(dtype), create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight))

    leaves, direction = _leaves((ROWS, WIDTH), (WIDTH,)), torch.randn(ROWS, WIDTH)
    ours, rival = penalty(layer_norm, torch.float32), penalty(F.layer_norm, torch.float32)
    for tensors in zip(ours, rival, penalty(F.layer_norm, torch.float64)):
        assert_as_exact_as(*tensors, "second derivative of layer_norm")


@needs_kernels
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own jvp of layer_norm
def test_transforms_and_forward_mode_are_pytorchs() -> None:
    x, tangent = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)

    def derivative(function: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda x: function(x, (WIDTH,)), (x,), (tangent,))[1]

    assert torch.equal(derivative(layer_norm), derivative(F.layer_norm))
    assert torch.equal(derivative(rms_norm), derivative(F.rms_norm))
    rows = torch.func.vmap(lambda row: layer_norm(row, (WIDTH,)))(x)
    assert torch.equal(rows, torch.func.vmap(lambda row: F.layer_norm(row, (WIDTH,)))(x))


@needs_kernels
def test_only_one_of_two_outputs_is_used() -> None:
    stream, branch, weight = _leaves((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,))
    gradient = torch.randn(ROWS, WIDTH)
    normalized, summed = add_layer_norm(stream, branch, (WIDTH,), weight)
    for output, expected in ((summed, gradient), (normalized, None)):
        grads = torch.autograd.grad(output, (stream, branch), gradient, retain_graph=True)
        assert torch.equal(grads[0], grads[1])
        if expected is not None:
            assert torch.equal(grads[0], expected)


# What would go wrong if a kernel did; each is the reference with one mistake.


def _without_eps(x: Tensor, weight: Tensor) -> Tensor:
    return reference.norm(x, weight, None, 1, True, 0.0)[0]


def _with_sample_variance(x: Tensor, weight: Tensor) -> Tensor:
    centered = x.float() - x.float().mean(-1, keepdim=True)
    return (centered / (x.float().var(-1, keepdim=True) + 1e-5).sqrt() * weight.float()).to(x.dtype)


def _with_bfloat16_sums(x: Tensor, weight: Tensor) -> Tensor:
    mean = x.bfloat16().mean(-1, keepdim=True).float()
    return F.layer_norm(x, x.shape[-1:], weight) + ((x.float().mean(-1, keepdim=True) - mean) * 1).to(x.dtype)


def _in_one_pass(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize(
    ("mistake", "input"),
    [
        (_without_eps, 1e-3 * torch.randn(64, 96)),
        (_with_sample_variance, torch.randn(64, 96)),
        (_with_bfloat16_sums, torch.randn(64, 96)),
        (_in_one_pass, 1e3 + torch.randn(64, 96)),
    ],
)
def test_the_tolerance_catches(mistake: Callable[[Tensor, Tensor], Tensor], input: Tensor) -> None:
    weight = torch.randn(96)
    truth = F.layer_norm(input.double(), (96,), weight.double())
    rival = F.layer_norm(input, (96,), weight)
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact_as(mistake(input, weight), rival, truth, "mistaken layer norm")


def test_the_tolerance_catches_weight_gradients_in_bfloat16() -> None:
    x, weight, gradient = torch.randn(512, 96).bfloat16(), torch.randn(96).bfloat16(), torch.randn(512, 96).bfloat16()

    def weight_gradient(dtype: torch.dtype) -> Tensor:
        wide = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(F.layer_norm(x.to(dtype), (96,), wide), wide, gradient.to(dtype))[0]

    total = torch.zeros(96, dtype=torch.bfloat16)
    for product in (gradient * F.layer_norm(x, (96,))).unbind(0):
        total = total + product
    # PyTorch's own kernel, on one thread, sums in bfloat16 too, and would let this pass: the rival sums in float32.
    rival = weight_gradient(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact_as(total, rival, weight_gradient(torch.float64), "weight gradient summed in bfloat16")
