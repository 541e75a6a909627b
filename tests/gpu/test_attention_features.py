"""Whatever attention is asked for, the Triton kernels compute it as exactly as PyTorch with the scores written out.

The calls are those that the C++ kernels are tested with, smaller, because they are interpreted.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from attention_blocks import Cache
from attention_case import gradients
from attention_features import FEATURES, Call, Judged, seen_pairs
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import reference
from trilby.kernels.gpu.attention_tiles import AttentionTiles, DecodeTiles
from trilby.kernels.options import AttentionOptions

TILES = AttentionTiles(block_m=32, block_n=32, num_warps=4, num_stages=1)
WIDE = AttentionTiles(block_m=16, block_n=64, num_warps=4, num_stages=1, products=True, prefetch_masked=False)
SPLIT = DecodeTiles(AttentionTiles(block_m=64, block_n=32, num_warps=4, num_stages=1), split_keys=32)
LONGEST = 60
FEW_QUERIES = 9


def small(call: Call) -> Call:
    """A call of one batch, two heads and two tiles: what is interpreted takes 40 ms a tile, whatever its size."""
    shrink = max(call.T, call.S) / LONGEST
    T, S = math.ceil(call.T / shrink), math.ceil(call.S / shrink)
    lengths = tuple((-(-queries // 3), -(-keys // 3)) for queries, keys in call.lengths if queries < 100)
    if lengths:
        T, S = (sum(of) + 3 for of in zip(*lengths))
    return replace(call, B=1, H=2, Hkv=1, T=T, S=S, D=16, Dv=20, lengths=lengths)


def few(call: Call) -> Call:
    """A call with the queries of one step of decoding, or of a few."""
    lengths = tuple((min(queries, FEW_QUERIES), keys) for queries, keys in call.lengths)
    return replace(call, T=sum(queries for queries, _ in lengths) + 3 if lengths else FEW_QUERIES, lengths=lengths)


def results(kernels, one: Judged, tiles: AttentionTiles) -> tuple[Tensor, ...]:
    """What the kernels compute, in the order of `RESULTS`."""
    output, logsumexp = forward(kernels, one, tiles)
    inputs = (one.grad_output, *(tensor.detach() for tensor in one.inputs), output, logsumexp)
    return output, logsumexp, *kernels.attention_backward(*inputs, *one.options, tiles=tiles)


def forward(kernels, one: Judged, tiles: AttentionTiles | DecodeTiles) -> tuple[Tensor, Tensor]:
    return kernels.attention(*(tensor.detach() for tensor in one.inputs), *one.options, tiles=tiles)


@lru_cache
def judged(name: str, dtype: torch.dtype = torch.float32) -> Judged:
    torch.manual_seed(0)
    return Judged.of(small(FEATURES[name]), dtype)


@pytest.mark.parametrize("name", FEATURES)
def test_as_exact_as_pytorch_with_scores_written_out(kernels, name):
    one = judged(name)
    found = results(kernels, one, TILES)
    # Of one key the gradients are 0 but for rounding, which test_attention_backward.py bounds.
    one.judge(*found[:2] if name == "window of one key" else found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "packed, everything"])
def test_half_precision(kernels, name, dtype):
    one = judged(name, dtype)
    one.judge(*results(kernels, one, WIDE))


@pytest.mark.parametrize("name", FEATURES)
def test_a_few_queries_and_split_keys(kernels, name):
    torch.manual_seed(0)
    one = Judged.of(few(small(FEATURES[name])), torch.float32)
    one.judge(*forward(kernels, one, SPLIT))


def test_twice_the_same_bits(kernels):
    one = judged("everything")
    for first, second in zip(results(kernels, one, TILES), results(kernels, one, TILES)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["window, lower right", "mask of padding", "key lengths", "everything"])
def test_hidden_keys_and_values_cannot_leak(kernels, name):
    """Keys and values of NaN and infinity that a query does not see are nothing to it, in no result."""
    call = small(FEATURES[name])
    one = judged(name)
    key, value = (tensor.detach().clone() for tensor in one.inputs[1:])
    sees = seen_pairs(call, one.options)  # [B, H, T, S]
    chosen = int(sees.any(1).sum(1).flatten().argmin())  # the key that the fewest queries see
    key[:, :, chosen], value[:, :, chosen] = torch.nan, torch.inf
    feels = sees[..., chosen]
    poisoned = replace(one, inputs=(one.inputs[0], key, value), grad_output=one.grad_output * ~feels[..., None])
    assert not feels.all()
    output, logsumexp, grad_query, *_ = results(kernels, poisoned, TILES)
    grad_truth, grad_rival = (
        gradients(exact, inputs, poisoned.grad_output)[0]
        for exact, inputs in (_computed(one, torch.float64), _computed(one, torch.float32))
    )
    for name, mine, rival, truth in (
        ("output", output, one.rival[0], one.truth[0]),
        ("logsumexp", logsumexp, one.rival[1], one.truth[1]),
        ("grad_query", grad_query, grad_rival, grad_truth),
    ):
        assert_as_exact_as(mine[~feels], rival[~feels], truth[~feels], name)


def _computed(one: Judged, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's output of the inputs in another dtype, and those."""
    inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in one.inputs)
    return reference.attention(*inputs, *one.options)[0], inputs


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["forward", "decode"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [1, 16, 24], ids=lambda size: f"blocks of {size}")
def test_keys_in_blocks_are_keys(kernels, size, packed, tiles):
    """The same keys, out of order in blocks, of which what no sequence has is NaN, give the same bits."""
    torch.manual_seed(0)
    cache = Cache((40, 0, 27), H=2, Hkv=1, T=5, S=40, D=16, window_left=30)
    cache.assert_blocks_change_nothing(partial(kernels.attention, tiles=tiles), size, packed)


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["forward", "decode"])
def test_a_sequence_is_computed_alike_whatever_else_is_in_the_batch(kernels, tiles):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 16), torch.randn(3, 2, 50, 16), torch.randn(3, 2, 50, 16)
    options = AttentionOptions(scale=0.25, lower_right=True, window_right=0)
    together = kernels.attention(query, key, value, *options, tiles=tiles)
    for n in range(3):
        alone = kernels.attention(query[n : n + 1], key[n : n + 1], value[n : n + 1], *options, tiles=tiles)
        assert all(torch.equal(one, many[n : n + 1]) for one, many in zip(alone, together))


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["forward", "decode"])
def test_dropout_drops_what_the_reference_drops(kernels, tiles):
    """Seen through values that are the unit matrix, and through their gradient."""
    S, seed = 40, torch.tensor([-(2**62) + 12345])
    T = S if tiles is TILES else FEW_QUERIES
    query, key, value = torch.zeros(2, 2, T, 16), torch.zeros(2, 2, S, 16), torch.eye(S).expand(2, 2, S, S)
    options = AttentionOptions(seed=seed, scale=1.0, dropout_p=0.4)
    expected = reference.attention(query, key, value, *options)[0]
    output, logsumexp = kernels.attention(query, key, value, *options, tiles=tiles)
    assert torch.equal(output != 0, expected != 0)
    assert 0.5 < (output != 0).float().mean() < 0.7
    if tiles is TILES:
        rest = (query, key, value, output, logsumexp)
        grad_value = kernels.attention_backward(value, *rest, *options, tiles=tiles)[2]
        assert torch.equal(grad_value != 0, expected.mT != 0)
