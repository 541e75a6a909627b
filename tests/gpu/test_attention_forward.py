"""The Triton attention kernels compute what kernels/reference/ says, as exactly as PyTorch's own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as
from trilby.kernels import reference
from trilby.kernels.gpu.attention_tiles import AttentionTiles

# Small tiles make short sequences cross many of them; lengths around multiples of 16 and 32 meet every stage.
SMALL = AttentionTiles(block_m=32, block_n=16, num_warps=4, num_stages=1)
FULL, CAUSAL = (reference.AttentionOptions.plain(is_causal, 0.25) for is_causal in (False, True))
WIDE = AttentionTiles(block_m=16, block_n=32, num_warps=4, num_stages=1)
DESCRIPTORS = AttentionTiles(block_m=16, block_n=32, num_warps=4, num_stages=1, descriptors=True)
COMPILED = AttentionTiles(block_m=16, block_n=32, num_warps=4, num_stages=1, compiled_stride=True)


def inputs(B, H, Hkv, T, S, D, Dv=None, dtype=torch.float32, seed=0):
    """Random query [B, H, T, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv or D))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def assert_exact(kernels, query, key, value, is_causal=False, scale=None, tiles=SMALL):
    """Ours as exact as PyTorch's, against float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = reference.AttentionOptions.plain(is_causal, scale)
    output, logsumexp = kernels.attention(query, key, value, *options, tiles=tiles)
    true_output, true_logsumexp = reference.attention(query.double(), key.double(), value.double(), *options)
    rival = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    assert output.dtype == query.dtype
    assert logsumexp.dtype == torch.float32
    assert_as_exact_as(output, rival, true_output, "output")
    float32_logsumexp = reference.attention(query.float(), key.float(), value.float(), *options)[1]
    assert_as_exact_as(logsumexp, float32_logsumexp, true_logsumexp, "logsumexp")


def assert_exact_with_and_without_mask(kernels, query, key, value):
    for is_causal in (True, False):
        assert_exact(kernels, query, key, value, is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (16, 16), (33, 33), (70, 70), (33, 90), (90, 33), (1, 65)])
def test_lengths(kernels, T, S, is_causal, dtype):
    assert_exact(kernels, *inputs(1, 1, 1, T, S, 16, dtype=dtype), is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_wider_than_high(kernels, is_causal):
    assert_exact(kernels, *inputs(1, 1, 1, 70, 70, 16), is_causal, tiles=WIDE)


@pytest.mark.parametrize("dims", [(16, 16), (16, 40)], ids=["one stride", "two strides"])
def test_strides_that_are_compiled_in(kernels, dims):
    query, key, value = inputs(2, 2, 2, 70, 70, *dims)
    key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (key, value))
    assert_exact(kernels, query, key, value, True, tiles=COMPILED)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "S", "D"), [(70, 70, 16), (33, 90, 40), (90, 33, 16)])
def test_tensor_descriptors(kernels, T, S, D, is_causal):
    assert_exact(kernels, *inputs(2, 4, 2, T, S, D), is_causal, tiles=DESCRIPTORS)


def test_tensor_descriptors_give_the_bits_of_pointers(kernels):
    tensors = inputs(2, 2, 2, 70, 70, 16)
    by_pointer = kernels.attention(*tensors, *CAUSAL, tiles=replace(DESCRIPTORS, descriptors=False))
    by_descriptor = kernels.attention(*tensors, *CAUSAL, tiles=DESCRIPTORS)
    assert all(map(torch.equal, by_descriptor, by_pointer))


def test_tensor_descriptors_leak_nothing_of_hidden_keys(kernels):
    query, key, value = inputs(2, 2, 2, 70, 70, 16)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)[:, :, :60]
    truth = reference.attention(query.double(), key.double(), value.double(), *CAUSAL)[0][:, :, :60]
    key[:, :, 60:], value[:, :, 60:] = torch.nan, torch.inf
    output, _ = kernels.attention(query, key, value, *CAUSAL, tiles=DESCRIPTORS)
    assert_as_exact_as(output[:, :, :60], expected, truth, "output")


def test_tensor_descriptors_end_where_a_packed_sequence_ends(kernels):
    query, key, value = inputs(1, 2, 2, 70, 90, 16)
    starts = torch.tensor([0, 30, 70], dtype=torch.int32), torch.tensor([0, 50, 90], dtype=torch.int32)
    options = FULL._replace(query_starts=starts[0], key_starts=starts[1], longest_query=40)
    expected = kernels.attention(query, key, value, *options, tiles=replace(DESCRIPTORS, descriptors=False))
    key[:, :, 50:] = torch.nan  # the second sequence's
    value[:, :, 50:] = torch.nan
    output, logsumexp = kernels.attention(query, key, value, *options, tiles=DESCRIPTORS)
    assert torch.equal(output[:, :, :30], expected[0][:, :, :30])
    assert torch.equal(logsumexp[:, :, :30], expected[1][:, :, :30])


@pytest.mark.parametrize("T", [1, 40, 130])
def test_the_tiles_of_the_table(kernels, T):
    assert_exact(kernels, *inputs(1, 1, 1, T, T, 64, dtype=torch.bfloat16), True, tiles=None)


@pytest.mark.parametrize("D", [16, 32, 40, 64, 80, 96, 128, 256, 1, 5])
def test_head_dims(kernels, D):
    assert_exact(kernels, *inputs(1, 1, 1, 33, 33, D), is_causal=True)


@pytest.mark.parametrize(("D", "Dv"), [(32, 64), (64, 24), (16, 1)])
def test_value_head_dim_may_differ(kernels, D, Dv):
    assert_exact(kernels, *inputs(1, 2, 1, 33, 33, D, Dv), is_causal=True)


@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_query_heads_share_key_heads(kernels, H, Hkv):
    assert_exact(kernels, *inputs(1, H, Hkv, 20, 20, 16), is_causal=True)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 5, 5, 16), (1, 0, 0, 5, 5, 16), (1, 2, 2, 0, 5, 16), (1, 2, 2, 5, 0, 16)],
    ids=["no batch", "no heads", "no queries", "no keys"],
)
def test_zero_sizes(kernels, shape):
    query, key, value = inputs(*shape)
    output, logsumexp = kernels.attention(query, key, value, *FULL)
    assert torch.equal(output, torch.zeros_like(query))
    assert torch.equal(logsumexp, torch.full(query.shape[:3], -torch.inf))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, -0.5])
def test_scales(kernels, scale):
    assert_exact(kernels, *inputs(1, 1, 1, 40, 40, 16), is_causal=True, scale=scale)


def contiguous(tensor):
    return tensor


def heads_inside(tensor):
    """Memory order (B, T, H, D), which a projection leaves behind."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor):
    """A third of a wider tensor, as split from a fused projection."""
    return torch.cat([tensor, tensor, tensor], dim=-1).chunk(3, dim=-1)[1]


def every_second_dim(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def dims_outside(tensor):
    """Memory order (B, H, D, T): the last dimension has the large stride."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def one_head_expanded(tensor):
    return tensor[:, :1].expand_as(tensor)


def unaligned(tensor):
    """Starts at an address that is no multiple of 16 bytes, rows of odd length."""
    return F.pad(tensor, (1, 2))[..., 1:-2]


LAYOUTS = [contiguous, heads_inside, sliced, every_second_dim, dims_outside, one_head_expanded, unaligned]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["query", "key", "value"])
def test_any_strides(kernels, layout, position):
    tensors = list(inputs(2, 2, 2, 17, 17, 16))
    tensors[position] = layout(tensors[position])
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    ours = kernels.attention(*tensors, *CAUSAL, tiles=SMALL)
    expected = kernels.attention(*copies, *CAUSAL, tiles=SMALL)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_output_lies_in_memory_as_tokens_then_heads(kernels):
    output, _ = kernels.attention(*inputs(2, 3, 3, 5, 5, 16), *CAUSAL)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_propagates(kernels, position, poison):
    tensors = inputs(1, 1, 1, 40, 40, 16)
    tensors[position][0, 0, 7, 3] = poison
    output, _ = kernels.attention(*tensors, *FULL, tiles=SMALL)
    expected = F.scaled_dot_product_attention(*tensors, scale=FULL.scale)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keys_past_a_tile_of_the_future_touch_nothing(kernels, poison):
    query, key, value = inputs(1, 1, 1, 96, 96, 16)
    expected, _ = kernels.attention(query, key, value, *CAUSAL, tiles=SMALL)
    key[:, :, 64:], value[:, :, 64:] = poison, poison
    output, _ = kernels.attention(query, key, value, *CAUSAL, tiles=SMALL)
    assert torch.equal(output[:, :, :64], expected[:, :, :64])


def test_scores_far_apart_do_not_overflow(kernels):
    query, key, value = inputs(1, 1, 1, 64, 64, 16)
    assert_exact(kernels, query * 200, key * 200, value, is_causal=True)


def test_rows_whose_first_tiles_score_minus_infinity(kernels):
    query, key, value = inputs(1, 1, 1, 20, 64, 16)
    query[..., 0], key[:, :, :40, 0] = 1.0, -torch.inf
    assert_exact(kernels, query, key, value)


def test_twice_the_same_bits(kernels):
    tensors = inputs(1, 2, 1, 40, 40, 32, dtype=torch.float16)
    first, second = (kernels.attention(*tensors, *CAUSAL, tiles=SMALL) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (TypeError, "query is torch.float64", lambda q, k, v: (q.double(), k.double(), v.double())),
        (TypeError, "value is torch.float16", lambda q, k, v: (q, k, v.half())),
        (ValueError, "key's head dimension is 272", lambda q, k, v: (q, k.repeat(1, 1, 1, 17), v)),
        (ValueError, "key has shape", lambda q, k, v: (q, k[:, :, :, :8], v)),
        (ValueError, "value has shape", lambda q, k, v: (q, k, v[:, :, :3])),
        (ValueError, "query has shape", lambda q, k, v: (q[0], k, v)),
        (ValueError, "Hkv divides 3", lambda q, k, v: (q.repeat(1, 3, 1, 1), k.repeat(1, 2, 1, 1), v)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kernels, error, name, change):
    with pytest.raises(error, match=name):
        kernels.attention(*change(*inputs(1, 1, 1, 5, 5, 16)), *CAUSAL)


@pytest.mark.parametrize(
    ("mistake", "module", "old", "new"),
    [
        ("the scale is dropped", "score", "Scoring(tl.abs(rule.scale)", "Scoring(tl.abs(rule.scale) * 0 + 1"),
        ("the mask is one key late", "score", "queries + band.last + 1", "queries + band.last + 2"),
        ("the mask is one key early", "score", "queries + band.last + 1", "queries + band.last"),
        ("the end is not masked", "score", "    end = band.keys\n", "    end = band.keys + 999\n"),
        ("the sum does not decay", "forward", "row_sum * decay[:, None]", "row_sum"),
        ("the last key is left out", "sequence", "end = end_key\n    full_end", "end = end_key - 1\n    full_end"),
    ],
)
def test_mistakes_are_seen(mutant, mistake, module, old, new):
    wrong = mutant(f"attention_{module}", old, new)
    with pytest.raises(AssertionError, match="error"):
        assert_exact_with_and_without_mask(wrong, *inputs(1, 1, 1, 33, 33, 16))


@pytest.mark.parametrize(
    ("mistake", "old", "new"),
    [
        ("ends a key late", "[sequence.keys, DIM], [", "[sequence.keys + 1, DIM], ["),
        ("ends a key early", "[sequence.keys, DIM], [", "[sequence.keys - 1, DIM], ["),
        ("begins a key late", "descriptor.load([first, 0])", "descriptor.load([first + 1, 0])"),
    ],
)
def test_mistakes_of_descriptors_are_seen(mutant, mistake, old, new):
    wrong = mutant("attention_sequence", old, new)
    with pytest.raises(AssertionError):
        test_tensor_descriptors_end_where_a_packed_sequence_ends(wrong)
