"""What attention means, told by PyTorch's own function with everything written out as a mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from trilby.kernels import attend, reference, varlen_attn
from trilby.kernels.reference import AttentionOptions

B, H, T, S, D = 2, 4, 5, 9, 8


def inputs(T: int = T, S: int = S, Hkv: int = H) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, to be compared to the last digits."""
    shapes = (B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, D)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def window(T: int, S: int, left: int, right: int, lower_right: bool) -> Tensor:
    """Pair by pair, as the definition reads."""
    offset = S - T if lower_right else 0

    def sees(i: int, j: int) -> bool:
        return (left < 0 or i + offset - left <= j) and (right < 0 or j <= i + offset + right)

    return torch.tensor([[sees(i, j) for j in range(S)] for i in range(T)])


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Equal, and so are the gradients."""
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize("bounds", [(-1, -1), (-1, 0), (2, 0), (0, 0), (1, 2), (3, -1)])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (7, 7), (1, 9)], ids=str)
def test_windows(lengths: tuple[int, int], bounds: tuple[int, int], lower_right: bool) -> None:
    query, key, value = inputs(*lengths)
    mask = window(*lengths, *bounds, lower_right)
    ours = attend(query, key, value, window_size=bounds, lower_right=lower_right)
    assert_same(ours, F.scaled_dot_product_attention(query, key, value, mask), query, key, value)


def test_lower_right_is_pytorchs() -> None:
    query, key, value = inputs()
    ours = attend(query, key, value, is_causal=True, lower_right=True)
    assert_same(ours, F.scaled_dot_product_attention(query, key, value, causal_lower_right(T, S)), query, key, value)


def test_an_alignment_must_be_said_where_it_matters() -> None:
    with pytest.raises(ValueError, match="lower_right was not given"):
        attend(*inputs(), is_causal=True)
    attend(*inputs(7, 7), is_causal=True)
    attend(*inputs())


@pytest.mark.parametrize("shape", [(T, S), (B, 1, T, S), (H, 1, S)], ids=str)
@pytest.mark.parametrize("is_added", [False, True])
def test_masks(shape: tuple[int, ...], is_added: bool) -> None:
    mask = torch.randn(shape) if is_added else torch.rand(shape) > 0.4
    query, key, value = inputs(Hkv=2)
    ours = attend(query, key, value, mask, softcap=0.0)
    theirs = F.scaled_dot_product_attention(
        query, key, value, mask if mask.dtype == torch.bool else mask.double(), enable_gqa=True
    )
    assert_same(ours, theirs, query, key, value)


def test_softcap_and_alibi_come_before_the_mask() -> None:
    query, key, value = inputs()
    slopes = torch.rand(B, H)
    scores = 1.5 * (query @ key.mT / math.sqrt(D) / 1.5).tanh()
    distance = (torch.arange(T)[:, None] + S - T - torch.arange(S)).abs()
    scores = scores - slopes[:, :, None, None].double() * distance
    theirs = scores.masked_fill(~window(T, S, 3, 0, True), -torch.inf).softmax(-1) @ value
    ours = attend(query, key, value, softcap=1.5, alibi_slopes=slopes, window_size=(3, 0), lower_right=True)
    assert_same(ours, theirs, query, key, value)


def test_key_lengths_and_blocks_are_masks() -> None:
    query, key, value = inputs()
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    mask = (torch.arange(S) < lengths[:, None])[:, None, None]
    theirs = F.scaled_dot_product_attention(query, key, value, mask)
    assert_same(attend(query, key, value, key_lengths=lengths), theirs, query, key, value)
    size, order = 3, torch.randperm(6)
    table = order.view(2, 3).int()
    blocks = [torch.empty(6, H, size, D, dtype=torch.float64) for _ in range(2)]
    for cache, tensor in zip(blocks, (key, value)):
        cache[order] = tensor.detach().unflatten(2, (3, size)).transpose(1, 2).flatten(0, 1)
    paged = attend(query.detach(), *blocks, key_lengths=lengths, block_table=table)
    torch.testing.assert_close(paged, theirs.detach())


def test_a_query_that_sees_nothing() -> None:
    query, key, value = inputs()
    output, logsumexp = attend(query, key, value, torch.zeros(T, S, dtype=torch.bool), return_logsumexp=True)
    assert not output.any()
    assert (logsumexp == -torch.inf).all()
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), (query, key, value)))


@pytest.mark.parametrize("bounds", [(-1, -1), (-1, 0), (2, 1)])
def test_packed_sequences_are_sequences_alone(bounds: tuple[int, int]) -> None:
    queries, keys = [3, 0, 1, 6], [3, 2, 0, 8]
    query, key, value = (
        torch.randn(sum(lengths) + 2, H, D, dtype=torch.float64, requires_grad=True)
        for lengths in (queries, keys, keys)
    )
    starts = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (queries, keys)]
    ours = varlen_attn(query, key, value, *starts, max(queries), max(keys), window_size=bounds)
    pieces = [
        attend(*(x[a:b].transpose(0, 1)[None] for x, (a, b) in zip((query, key, value), ((q, qe), (k, ke), (k, ke)))),
               window_size=bounds, lower_right=True)[0].transpose(0, 1)
        for q, qe, k, ke in zip(*(starts[i][j:].tolist() for i in (0, 1) for j in (0, 1)))
    ]  # fmt: skip
    assert_same(ours, torch.cat([*pieces, torch.zeros(2, H, D)]), query, key, value)


def test_backward_is_the_gradient_of_the_forward() -> None:
    query, key, value = inputs(Hkv=2)
    options = AttentionOptions(
        mask=torch.randn(1, 1, T, S).expand(B, H, T, S),
        alibi_slopes=torch.rand(B, H),
        seed=torch.tensor([7]),
        key_lengths=torch.tensor([9, 6], dtype=torch.int32),
        scale=0.4,
        lower_right=True,
        window_left=4,
        window_right=1,
        softcap=2.0,
        dropout_p=0.3,
    )
    output, logsumexp = reference.attention(query, key, value, *options)
    grad_output = torch.randn_like(output)
    truth = torch.autograd.grad(output, (query, key, value), grad_output)
    ours = reference.attention_backward(grad_output, query, key, value, output, logsumexp, *options)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b)


def test_dropout_drops_by_place_and_keeps_the_mean() -> None:
    seed, planes, rows = torch.tensor([2**40 + 5]), torch.arange(6), torch.arange(64)
    factors = reference.attention_dropout_factors(seed, planes, rows, 100, 0.25)
    assert set(factors.unique().tolist()) == {0.0, factors.max().item()}
    assert abs(factors.mean().item() - 1) < 5 * math.sqrt(0.25 / 0.75 / factors.numel())
    part = reference.attention_dropout_factors(seed, planes[2:3], rows[40:], 30, 0.25)
    assert torch.equal(part[0], factors[2, 40:, :30])
    assert not reference.attention_dropout_factors(seed, planes, rows, 100, 1.0).any()
    for other in (seed + 1, seed + 2**32):
        agree = reference.attention_dropout_factors(other, planes, rows, 100, 0.25) == factors
        assert abs(agree.float().mean().item() - 0.625) < 0.02


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"attn_mask": torch.ones(T, S).int()}, TypeError, "attn_mask is torch.int32"),
        ({"attn_mask": torch.ones(T, S + 1)}, ValueError, "attn_mask has shape"),
        ({"attn_mask": torch.ones(T, S, requires_grad=True)}, ValueError, "attn_mask requires a gradient"),
        ({"alibi_slopes": torch.ones(H + 1)}, ValueError, "alibi_slopes has shape"),
        ({"alibi_slopes": torch.ones(H).double()}, TypeError, "alibi_slopes is torch.float64"),
        ({"key_lengths": torch.ones(B)}, TypeError, "key_lengths is torch.float32"),
        ({"key_lengths": torch.ones(1, dtype=torch.int32)}, ValueError, "key_lengths has shape"),
        ({"block_table": torch.ones(B, 2, dtype=torch.int32)}, ValueError, "without key_lengths"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p was 1.5"),
        ({"softcap": -1.0}, ValueError, "softcap was -1.0"),
    ],
)
def test_errors_name_the_argument(wrong: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(*inputs(), **{"lower_right": True, **wrong})  # type: ignore[arg-type]
