"""`scaled_dot_product_attention` is PyTorch's, whoever computes."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_case import DTYPES, Case, needs_extension, pytorch, trilby
from tolerance import assert_as_exact_as
from torch import Tensor, nn
from trilby.kernels import reference, scaled_dot_product_attention
from trilby.kernels.attention import reasons_for_pytorch
from trilby.kernels.attention_arguments import AttentionArguments
from trilby.kernels.attention_rules import FEWEST_MASKED_MULTIPLICATIONS

CASE = Case(2, 4, 4, 100, 100, 32, 32)


@needs_extension
def test_trilby_computes_what_it_covers() -> None:
    inputs = CASE.inputs(torch.float32)
    assert not list(reasons_for_pytorch(AttentionArguments(*inputs)))
    assert torch.equal(scaled_dot_product_attention(*inputs, is_causal=True), trilby(*inputs, CASE))


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("masked scores take 2560000 mult", {"attn_mask": torch.ones(100, 100, dtype=torch.bool)}),
        ("attn_mask requires a gradient", {"attn_mask": torch.zeros(100, 100, requires_grad=True)}),
    ],
)
def test_the_rest_is_pytorchs(reason: str, arguments: dict[str, Tensor]) -> None:
    inputs = CASE.inputs(torch.float32)
    assert any(given.startswith(reason) for given in reasons_for_pytorch(AttentionArguments(*inputs, **arguments)))
    ours = scaled_dot_product_attention(*inputs, **arguments)
    assert torch.equal(ours, F.scaled_dot_product_attention(*inputs, **arguments))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(100, 100), (1, 100), (2, 1, 1, 100), (4, 100, 100), (2, 4, 100, 1)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_half_precision_are_trilbys(shape: tuple[int, ...], additive: bool, dtype: torch.dtype) -> None:
    inputs = CASE.inputs(dtype)
    mask = torch.randn(shape).to(dtype) if additive else torch.rand(shape) < 0.8
    assert reasons_for_pytorch(AttentionArguments(*inputs, mask)) == ()
    in_float64 = mask.double() if additive else mask
    truth = F.scaled_dot_product_attention(*(tensor.double() for tensor in inputs), in_float64)
    rival = F.scaled_dot_product_attention(*inputs, mask)
    assert_as_exact_as(scaled_dot_product_attention(*inputs, mask), rival, truth, "output")


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_trilbys_and_repeats_with_torchs_seed(dtype: torch.dtype) -> None:
    inputs = CASE.inputs(dtype)
    assert reasons_for_pytorch(AttentionArguments(*inputs, dropout_p=0.25)) == ()

    def drop(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return scaled_dot_product_attention(*inputs, dropout_p=0.25, is_causal=True)

    first = drop(1)
    assert torch.equal(first, drop(1))
    assert not torch.equal(first, drop(2))


def test_a_mask_with_is_causal_is_pytorchs() -> None:
    inputs = CASE.inputs(torch.bfloat16)
    mask = torch.rand(100, 100) < 0.8
    try:
        theirs = F.scaled_dot_product_attention(*inputs, mask, is_causal=True)
    except RuntimeError as refusal:  # torch 2.15's
        with pytest.raises(RuntimeError, match=re.escape(str(refusal))):
            scaled_dot_product_attention(*inputs, mask, is_causal=True)
    else:
        assert torch.equal(scaled_dot_product_attention(*inputs, mask, is_causal=True), theirs)


@needs_extension
def test_masks_of_float32_are_trilbys_where_they_hide_blocks_of_enough_scores() -> None:
    length = -(-FEWEST_MASKED_MULTIPLICATIONS // (2 * 64 * 32))
    query, (key, value) = torch.randn(1, 2, 64, 32), torch.randn(2, 1, 2, length, 32)
    seen = torch.ones(64, length, dtype=torch.bool).tril(length - 64)
    hidden = torch.zeros(64, length).masked_fill(~seen, -torch.inf)
    for mask in (seen, hidden, hidden.T.contiguous().T, hidden.expand(1, 2, 64, length), hidden[:1]):
        assert reasons_for_pytorch(AttentionArguments(query, key, value, mask)) == ()
    for mask in (seen, hidden):
        (reason,) = reasons_for_pytorch(AttentionArguments(query, key[:, :, 1:], value[:, :, 1:], mask[:, 1:]))
        assert reason.startswith("masked scores take")
    for mask in (torch.randn(64, length), hidden[-1], nn.Parameter(hidden, requires_grad=False)):
        (reason,) = reasons_for_pytorch(AttentionArguments(query, key, value, mask))
        assert reason == "attn_mask is added in float32, and no corner of it hides a pair"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((4, 4, 63, 500, 64), "there are 63 queries, fewer than 64"),
        ((1, 1, 64, 64, 64), "the scores take 262144 multiplications, fewer than 2000000"),
        ((4, 4, 128, 128, 257), "the head dimension is 257, above 256"),
    ],
)
def test_trainings_that_pytorch_ends_sooner_are_pytorchs(sizes: tuple[int, ...], reason: str) -> None:
    B, H, T, S, D = sizes
    inputs = [tensor.requires_grad_() for tensor in Case(B, H, H, T, S, D, D).inputs(torch.float32)]
    assert reason in reasons_for_pytorch(AttentionArguments(*inputs))
    assert torch.equal(scaled_dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize(
    "shapes",
    [
        ((9, 99, 64),) * 3,
        ((3, 5, 2, 99, 8),) * 3,
        ((999, 8),) * 3,
        ((9, 1, 99, 64), (9, 3, 99, 64), (9, 3, 99, 64)),
    ],
    ids=["three dimensions", "five dimensions", "two dimensions", "broadcast heads"],
)
def test_other_ranks_and_broadcasts_are_pytorchs(shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    assert list(reasons_for_pytorch(AttentionArguments(*inputs)))
    assert torch.equal(scaled_dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))


def test_float64_is_pytorchs() -> None:
    inputs = CASE.inputs(torch.float64)
    ours, theirs = (
        function(*inputs, is_causal=True) for function in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    assert torch.equal(ours, theirs)


def test_errors_are_pytorchs() -> None:
    query = torch.randn(1, 2, 4, 8)
    for arguments in (
        (query, query.bfloat16(), query),
        (query, query[0, 0, 0], query[0, 0, 0]),
        (query[0, 0, 0],) * 3,
        (query, torch.randn(1, 2, 4, 9), query),
        (query, torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8)),
    ):
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(*arguments)
        with pytest.raises(RuntimeError) as ours:
            scaled_dot_product_attention(*arguments)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    query, key, value = CASE.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = scaled_dot_product_attention(query, key.to(dtype), value, is_causal=True)
        theirs = F.scaled_dot_product_attention(query, key.to(dtype), value, is_causal=True)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    truth = pytorch(*(tensor.bfloat16().double() for tensor in (query, key, value)), CASE)
    assert_as_exact_as(ours, theirs, truth, "autocast")


@pytest.mark.slow
def test_compiled_whole_it_equals_eager() -> None:
    torch._dynamo.reset()

    def loss(*inputs: Tensor) -> Tensor:
        return scaled_dot_product_attention(*inputs, is_causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for length in (100, 101, 130):
        inputs = Case(1, 2, 2, length, length, 32, 32).inputs(torch.float32)
        eager = torch.autograd.grad(loss(*inputs), inputs)
        for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), eager):
            torch.testing.assert_close(ours, theirs)


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_keeps_torchs_contract(dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake kernel and compiled autograd, as torch.library checks them."""
    torch.library.opcheck(
        torch.ops.trilby.attention,
        (*Case(2, 4, 2, 9, 7, 8, 8).inputs(dtype), *reference.AttentionOptions.plain(True, 0.3)),
        atol=0.02,
        rtol=0.02,
    )
