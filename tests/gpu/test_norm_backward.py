"""The gradients of the Triton norms are as exact as PyTorch's own, and the same bits on every run."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from trilby.kernels import reference
from trilby.kernels.gpu.norm_launch import NormTiles

CHUNKS = NormTiles(block_n=64, num_warps=1, programs=2)  # rows of more than 64 elements go by in chunks
SEVERAL = NormTiles(block_n=128, num_warps=1, programs=2, block_m=4)  # rows at once; of 10, the last block has 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("grad_stream", "grad_branch", "grad_weight", "grad_bias")


def inputs(*shape, dtype=torch.float32, seed=0):
    """Random summed and grad_normalized of `shape`, weight and bias of its last dimension."""
    generator = torch.Generator().manual_seed(seed)
    summed, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    return summed, grad, weight, bias


def doubled(tensor):
    return None if tensor is None else tensor.double()


def gradients(kernels, summed, grad, weight, bias, centered=True, tiles=None):
    """Ours, from our own forward."""
    _, mean, rstd = kernels.norm(summed, weight, bias, 1, centered, 1e-5)
    return kernels.norm_backward(grad, None, summed, mean, rstd, weight, bias, None, 1, centered, 0.0, tiles=tiles)


def rival_gradients(summed, grad, weight, bias, centered):
    """PyTorch's, through autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (summed, weight, bias) if tensor is not None]
    present = iter(leaves)
    rows, weight, bias = (None if tensor is None else next(present) for tensor in (summed, weight, bias))
    if centered:
        output = F.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-5)
    else:
        output = F.rms_norm(rows, rows.shape[-1:], weight, 1e-5)
    return torch.autograd.grad(output, leaves, grad)


def assert_exact(kernels, summed, grad, weight, bias, centered=True, tiles=None):
    """Every gradient as exact as PyTorch's, against float64."""
    bias = bias if centered else None
    ours = gradients(kernels, summed, grad, weight, bias, centered, tiles)
    statistics = reference.statistics(summed.double(), 1, centered, 1e-5)
    truth = reference.norm_backward(
        grad.double(), None, summed.double(), *statistics, doubled(weight), doubled(bias), None, 1, centered, 0.0
    )
    rivals = iter(rival_gradients(summed, grad, weight, bias, centered))
    for name, one, true, parameter in zip(NAMES, ours, truth, (summed, None, weight, bias)):
        if parameter is None:
            assert one.shape == (0,)
            continue
        assert one.dtype == parameter.dtype
        assert_as_exact_as(one, next(rivals), true, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("width", [7, 64, 100, 768])
def test_widths(kernels, width, centered, dtype):
    assert_exact(kernels, *inputs(40, width, dtype=dtype), centered)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("width", [128, 200])
def test_chunks(kernels, width, centered, dtype):
    assert_exact(kernels, *inputs(20, width, dtype=dtype), centered, tiles=CHUNKS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("rows", [1, 4, 7, 10])
def test_several_rows_at_once(kernels, rows, centered, dtype):
    assert_exact(kernels, *inputs(rows, 100, dtype=dtype), centered, tiles=SEVERAL)


def test_rows_beyond_the_last_are_left_alone(kernels):
    """The last block of rows ends beyond the tensors: what lies there is neither read nor written."""
    summed, grad, weight, bias = inputs(12, 100)
    expected = gradients(kernels, summed[:10].clone(), grad[:10].clone(), weight, bias, tiles=SEVERAL)
    summed[10:], grad[10:] = float("nan"), float("nan")
    ours = gradients(kernels, summed[:10], grad[:10], weight, bias, tiles=SEVERAL)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected))


@pytest.mark.slow
@pytest.mark.parametrize("width", [8192, 8193, 65536])
def test_wide_rows(kernels, width):
    assert_exact(kernels, *inputs(4, width))


@pytest.mark.parametrize("tiles", [None, CHUNKS])
@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_are_optional(kernels, present, tiles):
    summed, grad, weight, bias = inputs(10, 100)
    weight, bias = weight if present[0] else None, bias if present[1] else None
    assert_exact(kernels, summed, grad, weight, bias, tiles=tiles)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 2, 2, 6)])
def test_ranks(kernels, shape):
    assert_exact(kernels, *inputs(*shape))


def test_no_rows(kernels):
    ours = gradients(kernels, *inputs(0, 8))
    assert ours[0].shape == (0, 8)
    assert torch.equal(ours[2], torch.zeros(8))
    assert torch.equal(ours[3], torch.zeros(8))


@pytest.mark.parametrize(
    "layout",
    [
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.repeat_interleave(2, dim=-1)[:, ::2],
        lambda tensor: tensor[:1].expand_as(tensor),
        lambda tensor: tensor[:1, :1].expand_as(tensor),
    ],
    ids=["transposed", "every second column", "one row", "one number"],
)
@pytest.mark.parametrize("position", [0, 1], ids=["summed", "grad_normalized"])
def test_any_strides(kernels, layout, position):
    tensors = list(inputs(6, 40))
    tensors[position] = layout(tensors[position])
    assert_exact(kernels, *tensors)
    if kernels.rounds_alike:
        copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        ours, expected = gradients(kernels, *tensors), gradients(kernels, *copies)
        assert all(torch.equal(one, other) for one, other in zip(ours, expected))


@pytest.mark.parametrize("tiles", [None, CHUNKS, SEVERAL])
def test_the_sum_and_dropout(kernels, tiles):
    stream, grad, weight, bias = inputs(10, 100)
    branch, grad_summed = inputs(10, 100, seed=1)[:2]
    seed = torch.tensor([42])
    _, summed, mean, rstd = kernels.add_norm(stream, branch, weight, bias, seed, 1, True, 1e-5, 0.3)
    ours = kernels.norm_backward(grad, grad_summed, summed, mean, rstd, weight, bias, seed, 1, True, 0.3, tiles=tiles)
    options = (seed, 1, True, 0.3)
    rival = reference.norm_backward(
        grad, grad_summed, summed, *reference.statistics(summed, 1, True, 1e-5), weight, bias, *options
    )
    statistics = reference.statistics(summed.double(), 1, True, 1e-5)
    truth = reference.norm_backward(
        grad.double(), grad_summed.double(), summed.double(), *statistics, weight.double(), bias.double(), *options
    )
    assert torch.equal(ours[1] == 0, rival[1] == 0)
    for name, one, other, true in zip(NAMES, ours, rival, truth):
        assert_as_exact_as(one, other, true, name)


def test_twice_the_same_bits(kernels):
    first, second = (gradients(kernels, *inputs(40, 100, dtype=torch.float16)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "grad_normalized has shape", lambda grad, summed: (grad[:3], None, summed)),
        (ValueError, "grad_summed has shape", lambda grad, summed: (grad, grad[:3], summed)),
        (TypeError, "grad_normalized is torch.float64", lambda grad, summed: (grad.double(), None, summed)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kernels, error, name, change):
    summed, grad, weight, bias = inputs(5, 8)
    _, mean, rstd = kernels.norm(summed, weight, bias, 1, True, 1e-5)
    with pytest.raises(error, match=name):
        kernels.norm_backward(*change(grad, summed), mean, rstd, weight, bias, None, 1, True, 0.0)


@pytest.mark.parametrize(
    ("mistake", "old", "new"),
    [
        (
            "the sum of gradients is left out",
            "grad_input -= tl.sum(gradient, 1, keep_dims=True) / WIDTH",
            "grad_input -= 0.0",
        ),
        ("a program forgets its earlier rows", "grad_weight += gradient * unit", "grad_weight = gradient * unit"),
        ("rstd is left out", "grad_input * row_rstd", "grad_input"),
        ("the last part is not summed", "(rows < programs)", "(rows < programs - 1)"),
    ],
)
def test_mistakes_are_seen(mutant, mistake, old, new):
    wrong = mutant("norm_backward", old, new)
    with pytest.raises(AssertionError, match="error"):
        assert_exact(wrong, *inputs(40, 100))
