"""The gradients of the Triton attention kernels are as exact as PyTorch's own, and the same bits on every run."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from trilby.kernels import reference
from trilby.kernels.gpu.attention_tiles import AttentionTiles

SMALL = AttentionTiles(block_m=32, block_n=16, num_warps=4, num_stages=1)
WIDE = AttentionTiles(block_m=16, block_n=32, num_warps=4, num_stages=1)


def inputs(B, H, Hkv, T, S, D, Dv=None, dtype=torch.float32, seed=0):
    """Random query, key, value and grad_output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv or D), (B, H, T, Dv or D))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def gradients(kernels, query, key, value, grad_output, is_causal, scale, tiles=SMALL):
    """Ours, from our own forward."""
    options = reference.AttentionOptions.plain(is_causal, scale)
    output, logsumexp = kernels.attention(query, key, value, *options, tiles=tiles)
    return kernels.attention_backward(grad_output, query, key, value, output, logsumexp, *options, tiles=tiles)


def rival_gradients(query, key, value, grad_output, is_causal, scale):
    """PyTorch's, through autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    enable_gqa = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(*leaves, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return torch.autograd.grad(output, leaves, grad_output)


def assert_exact(kernels, query, key, value, grad_output, is_causal=False, scale=None, tiles=SMALL):
    """Every gradient as exact as PyTorch's, against float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = reference.AttentionOptions.plain(is_causal, scale)
    ours = gradients(kernels, query, key, value, grad_output, is_causal, scale, tiles)
    rival = rival_gradients(query, key, value, grad_output, is_causal, scale)
    doubles = [tensor.double() for tensor in (query, key, value)]
    truth = reference.attention_backward(
        grad_output.double(), *doubles, *reference.attention(*doubles, *options), *options
    )
    for name, one, other, true in zip(("grad_query", "grad_key", "grad_value"), ours, rival, truth):
        assert one.dtype == query.dtype
        assert_as_exact_as(one, other, true, name)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(16, 16), (32, 32), (70, 70), (33, 90), (90, 33), (17, 65)])
def test_lengths(kernels, T, S, is_causal):
    assert_exact(kernels, *inputs(1, 1, 1, T, S, 16), is_causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision(kernels, is_causal, dtype):
    assert_exact(kernels, *inputs(1, 2, 2, 40, 40, 32, dtype=dtype), is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("S", [1, 65])
def test_a_query_with_one_key_has_no_gradient_but_rounding(kernels, S, dtype):
    query, key, value, grad_output = inputs(1, 2, 2, 1, S, 16, dtype=dtype)
    grad_query, grad_key, grad_value = gradients(kernels, query, key, value, grad_output, True, 1.0)
    # Two float32 sums of the same 16 products cancel; what is left is at most a rounding of each partial sum.
    products = (grad_output * value[:, :, :1]).float().abs().sum(-1).max()
    rounding = 16 * torch.finfo(torch.float32).eps * products
    assert grad_query.float().abs().max() <= rounding * key.float().abs().max()
    assert grad_key.float().abs().max() <= rounding * query.float().abs().max()
    # The probability is 1 but for a rounding of float32: an exponent of 2, and what the logsumexp left of it.
    assert_as_exact_as(grad_value[:, :, :1], grad_output, grad_output.double(), "gradient of the value")
    assert torch.equal(grad_value[:, :, :1], grad_output) or not kernels.rounds_alike
    assert torch.equal(grad_value[:, :, 1:], torch.zeros_like(value[:, :, 1:]))


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_wider_than_high(kernels, is_causal):
    assert_exact(kernels, *inputs(1, 1, 1, 70, 70, 16), is_causal, tiles=WIDE)


def test_the_tiles_of_the_table(kernels):
    assert_exact(kernels, *inputs(1, 1, 1, 100, 100, 64, dtype=torch.bfloat16), True, tiles=None)


@pytest.mark.parametrize("D", [16, 40, 64, 80, 96, 128, 256, 5])
def test_head_dims(kernels, D):
    assert_exact(kernels, *inputs(1, 1, 1, 33, 33, D), is_causal=True)


@pytest.mark.parametrize(("D", "Dv"), [(32, 64), (64, 24)])
def test_value_head_dim_may_differ(kernels, D, Dv):
    assert_exact(kernels, *inputs(1, 2, 1, 33, 33, D, Dv), is_causal=True)


@pytest.mark.parametrize(("H", "Hkv"), [(4, 2), (6, 2), (3, 1)])
def test_query_heads_share_key_heads(kernels, H, Hkv):
    assert_exact(kernels, *inputs(1, H, Hkv, 20, 20, 16), is_causal=True)


@pytest.mark.parametrize("scale", [0.0, 2.0, -0.5])
def test_scales(kernels, scale):
    assert_exact(kernels, *inputs(1, 1, 1, 40, 40, 16), is_causal=True, scale=scale)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 5, 5, 16), (1, 0, 0, 5, 5, 16), (1, 2, 2, 0, 5, 16), (1, 2, 2, 5, 0, 16)],
    ids=["no batch", "no heads", "no queries", "no keys"],
)
def test_zero_sizes(kernels, shape):
    query, key, value, grad_output = inputs(*shape)
    ours = gradients(kernels, query, key, value, grad_output, False, 1.0)
    for gradient, tensor in zip(ours, (query, key, value)):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def heads_inside(tensor):
    """Memory order (B, T, H, D), which a projection leaves behind."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def one_number_expanded(tensor):
    """What `output.sum().backward()` hands back."""
    return tensor[:1, :1, :1, :1].expand_as(tensor)


def every_second_dim(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def dims_outside(tensor):
    """Memory order (B, H, D, T)."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(
    "layout",
    [heads_inside, one_number_expanded, every_second_dim, dims_outside],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["query", "key", "value", "grad_output"])
def test_any_strides(kernels, layout, position):
    tensors = list(inputs(2, 2, 2, 17, 17, 16))
    tensors[position] = layout(tensors[position])
    assert_exact(kernels, *tensors, True, 0.25)
    if kernels.rounds_alike:
        copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        ours = gradients(kernels, *tensors, True, 0.25)
        expected = gradients(kernels, *copies, True, 0.25)
        assert all(torch.equal(one, other) for one, other in zip(ours, expected))


def test_twice_the_same_bits(kernels):
    tensors = inputs(1, 2, 1, 40, 40, 32, dtype=torch.float16)
    first, second = (gradients(kernels, *tensors, True, 0.2) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_the_future_touches_nothing(kernels, poison):
    query, key, value, grad_output = inputs(1, 1, 1, 96, 96, 16)
    grad_output[:, :, 64:] = 0
    expected = gradients(kernels, query, key, value, grad_output, True, 0.25)[0]
    key[:, :, 64:], value[:, :, 64:] = poison, poison
    ours = gradients(kernels, query, key, value, grad_output, True, 0.25)[0]
    assert torch.equal(ours[:, :, :64], expected[:, :, :64])


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "grad_output has shape", lambda g, o, s: (g[:, :, :3], o, s)),
        (TypeError, "output is torch.float16", lambda g, o, s: (g, o.half(), s)),
        (TypeError, "logsumexp is torch.float64", lambda g, o, s: (g, o, s.double())),
        (ValueError, "logsumexp has shape", lambda g, o, s: (g, o, s[:, :, :3])),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kernels, error, name, change):
    query, key, value, grad_output = inputs(1, 1, 1, 5, 5, 16)
    options = reference.AttentionOptions.plain(True, 1.0)
    results = change(grad_output, *kernels.attention(query, key, value, *options))
    with pytest.raises(error, match=name):
        kernels.attention_backward(results[0], query, key, value, *results[1:], *options)


@pytest.mark.parametrize(
    ("mistake", "module", "old", "new"),
    [
        ("the scale of grad_key is dropped", "backward_key_value", "grad_key_tile * rule.scale", "grad_key_tile"),
        ("the scale of grad_query is dropped", "backward_query", "(grad_query_tile * rule.scale)", "(grad_query_tile)"),
        ("the mask is late", "score", "queries + band.last + 1", "queries + band.last + 2"),
        ("the walk begins late", "sequence", "low = tl.maximum(first_key - band.last, 0)", "low = first_key + 1"),
        ("delta is left out", "backward", "tl.sum(product, 1)", "tl.sum(product, 1) * 0"),
        ("the last queries are left out", "backward_key_value", "stages.end - stages.full_end", "stages.end * 0"),
        ("one head of a group is heard", "backward_key_value", "group * masked_tiles", "masked_tiles"),
    ],
)
def test_mistakes_are_seen(mutant, mistake, module, old, new):
    wrong = mutant("attention_" + module, old, new)
    with pytest.raises(AssertionError, match="error"):
        assert_exact(wrong, *inputs(1, 2, 1, 33, 33, 16), is_causal=True)
