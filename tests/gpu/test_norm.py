"""The Triton norm kernels compute what kernels/reference/ says, as exactly as PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from trilby.kernels import reference
from trilby.kernels.gpu.norm_launch import NormTiles

CHUNKS = NormTiles(block_n=64, num_warps=1, programs=2)  # rows of more than 64 elements go by in chunks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(*shape, dtype=torch.float32, parameter_dtype=None, seed=0):
    """Random rows of `shape` around 1, so that means are not near 0, and weight and bias of its last dimension."""
    generator = torch.Generator().manual_seed(seed)
    rows = (1 + torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(parameter_dtype or dtype)
    bias = torch.randn(shape[-1], generator=generator).to(parameter_dtype or dtype)
    return rows, weight, bias


def doubled(tensor):
    return None if tensor is None else tensor.double()


def rival_norm(rows, weight, bias, centered, eps):
    """PyTorch's own, or its formula in rows's dtype for what PyTorch's own refuses."""
    if weight is not None and weight.dtype != rows.dtype and not (centered and weight.dtype == torch.float32):
        return reference.norm(rows, weight, bias, 1, centered, eps)[0]
    if centered:
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    return F.rms_norm(rows, rows.shape[-1:], weight, eps)


def assert_exact(kernels, rows, weight, bias, centered=True, eps=1e-5, tiles=None):
    """Ours as exact as PyTorch's, against float64."""
    bias = bias if centered else None
    output, mean, rstd = kernels.norm(rows, weight, bias, 1, centered, eps, tiles=tiles)
    truth = reference.norm(rows.double(), doubled(weight), doubled(bias), 1, centered, eps)
    assert output.dtype == rows.dtype
    assert_as_exact_as(output, rival_norm(rows, weight, bias, centered, eps), truth[0], "output")
    statistics = reference.statistics(rows, 1, centered, eps)
    assert_as_exact_as(mean, statistics[0], truth[1], "mean")
    assert_as_exact_as(rstd, statistics[1], truth[2], "rstd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("width", [2, 7, 64, 100, 768, 1000])
def test_widths(kernels, width, centered, dtype):
    assert_exact(kernels, *inputs(7, width, dtype=dtype), centered)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("width", [65, 128, 200])
def test_chunks(kernels, width, centered, dtype):
    assert_exact(kernels, *inputs(5, width, dtype=dtype), centered, tiles=CHUNKS)


@pytest.mark.slow
@pytest.mark.parametrize("width", [8192, 16384, 16385, 65536])
def test_wide_rows(kernels, width):
    assert_exact(kernels, *inputs(2, width))


def test_a_width_of_one(kernels):
    rows, weight, bias = inputs(5, 1)
    output, mean, _ = kernels.norm(rows, weight, bias, 1, True, 1e-5)
    assert torch.equal(output, bias.expand_as(output))
    assert torch.equal(mean, rows.squeeze(-1))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (2, 1, 2, 2, 6)])
def test_ranks(kernels, shape):
    rows, weight, bias = inputs(*shape)
    assert_exact(kernels, rows, weight, bias)
    assert kernels.norm(rows, weight, bias, 1, True, 1e-5)[2].shape == shape[:-1]


def test_several_normalized_dimensions(kernels):
    rows = inputs(4, 3, 8)[0]
    weight, bias = inputs(3, 8)[0], inputs(3, 8, seed=1)[0]
    output, mean, _ = kernels.norm(rows, weight, bias, 2, True, 1e-5)
    truth = reference.norm(rows.double(), weight.double(), bias.double(), 2, True, 1e-5)
    assert_as_exact_as(output, F.layer_norm(rows, (3, 8), weight, bias), truth[0], "output")
    assert mean.shape == (4,)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_are_optional(kernels, present):
    rows, weight, bias = inputs(3, 40)
    assert_exact(kernels, rows, weight if present[0] else None, bias if present[1] else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
def test_parameters_may_be_float32(kernels, centered, dtype):
    assert_exact(kernels, *inputs(3, 40, dtype=dtype, parameter_dtype=torch.float32), centered)


@pytest.mark.parametrize("tiles", [None, CHUNKS])
def test_rows_far_from_zero(kernels, tiles):
    rows, weight, bias = inputs(5, 768)
    assert_exact(kernels, rows + 1e6, weight, bias, tiles=tiles)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(kernels, shape):
    rows, weight, bias = inputs(*shape)
    output, mean, rstd = kernels.norm(rows, weight, bias, 1, True, 1e-5)
    assert output.shape == shape
    assert mean.shape == rstd.shape == shape[:-1]


@pytest.mark.parametrize(
    "layout",
    [
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.repeat_interleave(2, dim=-1)[:, ::2],
        lambda tensor: torch.cat([tensor, tensor], dim=-1)[:, : tensor.shape[1]],
        lambda tensor: tensor[:1].expand_as(tensor),
        lambda tensor: tensor[:, :1].expand_as(tensor),
        lambda tensor: F.pad(tensor, (1, 2))[:, 1:-2],
    ],
    ids=["transposed", "every second column", "half of a row", "one row", "one column", "unaligned"],
)
def test_any_strides(kernels, layout):
    rows, weight, bias = inputs(6, 40)
    ours = kernels.norm(layout(rows), weight, bias, 1, True, 1e-5)
    expected = kernels.norm(layout(rows).contiguous(), weight, bias, 1, True, 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(kernels, poison):
    rows, weight, bias = inputs(3, 40)
    rows[1, 7] = poison
    output = kernels.norm(rows, weight, bias, 1, True, 1e-5)[0]
    assert torch.equal(output.isnan(), F.layer_norm(rows, (40,), weight, bias).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("tiles", [None, CHUNKS])
def test_the_residual_add(kernels, tiles, centered, dtype):
    stream, weight, bias = inputs(5, 100, dtype=dtype)
    branch = inputs(5, 100, dtype=dtype, seed=1)[0]
    bias = bias if centered else None
    ours = kernels.add_norm(stream, branch, weight, bias, None, 1, centered, 1e-5, 0.0, tiles=tiles)
    assert torch.equal(ours[1], stream + branch)
    expected = kernels.norm(stream + branch, weight, bias, 1, centered, 1e-5, tiles=tiles)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[3], expected[2])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("width", "tiles"), [(100, None), (100, CHUNKS), (128, CHUNKS)])
def test_dropout_drops_what_the_reference_drops(kernels, width, tiles, dropout_p):
    stream, weight, bias = inputs(5, width)
    branch = inputs(5, width, seed=1)[0]
    seed = torch.tensor([0x123456789ABCDEF0])
    options = (weight, bias, seed, 1, True, 1e-5, dropout_p)
    ours = kernels.add_norm(stream, branch, *options, tiles=tiles)
    expected = reference.add_norm(stream, branch, *options)
    truth = reference.add_norm(
        stream.double(), branch.double(), weight.double(), bias.double(), seed, 1, True, 1e-5, dropout_p
    )
    assert torch.equal(ours[1] == stream, expected[1] == stream)
    for name, one, other, true in zip(("normalized", "summed", "mean", "rstd"), ours, expected, truth):
        assert_as_exact_as(one, other, true, name)


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (TypeError, "input is torch.float64", lambda x, w, b: (x.double(), w, b, 1)),
        (TypeError, "bias is torch.int64", lambda x, w, b: (x, w, b.long(), 1)),
        (ValueError, "weight has shape", lambda x, w, b: (x, w[:3], b, 1)),
        (ValueError, "normalized_dims is 3", lambda x, w, b: (x, w, b, 3)),
        (ValueError, "70000 elements", lambda x, w, b: (x.new_empty(1, 70000), None, None, 1)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kernels, error, name, change):
    with pytest.raises(error, match=name):
        kernels.norm(*change(*inputs(3, 8)), True, 1e-5)


@pytest.mark.parametrize(
    ("mistake", "old", "new"),
    [
        ("eps is left out", "/ WIDTH + eps", "/ WIDTH"),
        ("the padding is counted", "tl.where(mask, x - row_mean, 0.0)", "x - row_mean"),
        ("every program begins at the first row", "tl.range(tl.program_id(0), rows", "tl.range(0, rows - 1"),
        ("the bias is left out", "unit + bias_row", "unit"),
    ],
)
def test_mistakes_are_seen(mutant, mistake, old, new):
    wrong = mutant("norm_forward", old, new)
    with pytest.raises(AssertionError, match="error"):
        assert_exact(wrong, *inputs(7, 100), eps=0.1)
