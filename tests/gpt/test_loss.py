"""The loss in chunks is PyTorch's cross entropy of all the logits, which it never holds."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from torch.utils._python_dispatch import TorchDispatchMode
from trilby import kernels
from trilby.gpt import loss as loss_module
from trilby.gpt.loss import linear_cross_entropy, product_dtype, rows_per_chunk


def problem(N=50, C=24, V=200, dtype=torch.float32):
    hidden = torch.randn(N, C, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, C, dtype=dtype) / C**0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (N,))


def with_gradients(function, hidden, weight, target):
    loss = function(hidden, weight, target)
    return (loss.detach(), *torch.autograd.grad(loss * 3, (hidden, weight)))


def all_at_once(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)


@pytest.fixture(params=[1, 16 * 4 * 200, 2**25], ids=["chunks of 16 rows", "chunks that do not divide N", "one chunk"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(loss_module, "SOFTMAX_BYTES", 3 * 4 * 200)
    monkeypatch.setattr(loss_module, "ADDED_ROWS", 48)


@pytest.mark.parametrize("N", [1, 16, 50])
def test_loss_and_gradients_are_as_exact_as_pytorchs(N, chunk_bytes):
    arguments = problem(N)
    hidden, weight, target = arguments
    truth = with_gradients(all_at_once, hidden.detach().double().requires_grad_(), weight.double(), target)
    ours, rival = with_gradients(linear_cross_entropy, *arguments), with_gradients(all_at_once, *arguments)
    for name, *three in zip(("loss", "grad input", "grad weight"), ours, rival, truth):
        assert_as_exact_as(*three, name)


@pytest.mark.parametrize("is_slow", [False, True])
def test_under_autocast_it_is_as_exact_as_pytorchs(chunk_bytes, is_slow, monkeypatch):
    monkeypatch.setattr(kernels, "BFLOAT16_IS_SLOW", is_slow)
    arguments = problem()
    hidden, weight, target = arguments
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(linear_cross_entropy, *arguments)
        rival = with_gradients(all_at_once, *arguments)
    truth = with_gradients(all_at_once, hidden.detach().double().requires_grad_(), weight.double(), target)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    for name, *three in zip(("loss", "grad input", "grad weight"), ours, rival, truth):
        assert_as_exact_as(*three, name)


@pytest.mark.parametrize("is_slow", [False, True])
def test_products_are_in_autocasts_dtype_where_that_is_the_faster_one(is_slow, monkeypatch):
    monkeypatch.setattr(kernels, "BFLOAT16_IS_SLOW", is_slow)
    assert product_dtype("cpu", torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype("cpu", torch.float32) == (torch.float32 if is_slow else torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert product_dtype("cpu", torch.float32) == torch.float16


def test_the_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    arguments = problem(N=160, C=4, V=500)
    assert largest_tensor_made(all_at_once, *arguments) == 160 * 500
    assert largest_tensor_made(linear_cross_entropy, *arguments) == 16 * 500


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab_size", [65, 50257, 100277])
@pytest.mark.parametrize("count", [1, 160, 1024, 4096, 100_000])
def test_chunks_are_equal_and_stay_below_their_bytes(count, vocab_size, itemsize):
    rows = rows_per_chunk(count, vocab_size, itemsize)
    chunks = -(-count // rows)
    assert rows % 16 == 0
    assert 0 < rows * vocab_size * itemsize <= loss_module.CHUNK_BYTES
    assert chunks * rows - count < 16 * chunks


@pytest.mark.parametrize("chunk_bytes", [1, 2**25], indirect=True)
def test_what_a_backward_saves_is_overwritten_only_by_the_last_one(chunk_bytes):
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip((hidden, weight), once):
        assert torch.equal(tensor.grad, gradient + gradient + gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_loss_above_what_exp_can_reach_is_finite():
    hidden, weight = torch.full((1, 1), 1000.0), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])) == 2000.0


def test_without_gradients_it_makes_none():
    with torch.no_grad():
        assert not linear_cross_entropy(*problem()).requires_grad


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "argument"),
    [
        (((3, 4), (5, 6), (3,)), "input"),
        (((3,), (5, 3), (3,)), "input"),
        (((3, 4), (5, 4), (4,)), "target"),
        (((0, 4), (5, 4), (0,)), "target"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, argument):
    hidden, weight = (torch.zeros(shape) for shape in shapes[:2])
    with pytest.raises(ValueError, match=f"^{argument} (is|has)"):
        linear_cross_entropy(hidden, weight, torch.zeros(shapes[2], dtype=torch.int64))


def largest_tensor_made(function, *arguments):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
            return made

    with Largest() as mode:
        with_gradients(function, *arguments)
    return mode.numel
