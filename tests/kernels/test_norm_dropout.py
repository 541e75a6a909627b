"""Dropout inside the residual norms: the generator, its mask, what a seed and a checkpoint reproduce."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trilby.kernels import add_layer_norm, add_rms_norm, norm_rules, reference
from trilby.kernels.ops import NATIVE

needs_kernels = pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.reason or "loaded")
ROWS, WIDTH = 2048, 768  # trilby's own, not PyTorch's


def _words(seed: int, plane: int, row: int, columns: list[int]) -> list[int]:
    position = (torch.tensor(plane), torch.tensor(row), torch.tensor(columns))
    return reference.random_words(torch.tensor([seed]), *position).tolist()


def test_philox_gives_the_published_numbers() -> None:
    # kat_vectors of Random123: counter and key all zeros, and all ones.
    zeros = _words(0, 0, 0, [0, 16, 32, 48])
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    last_group = (2**32 - 1) // 16  # with lane 15 the first counter is 2^32 - 1
    ones = _words(-1, 2**32 - 1, -1, [last_group * 64 + 15 + 16 * number for number in range(4)])
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_words_are_uniform_and_distinct() -> None:
    rows, columns = torch.arange(256).unsqueeze(1), torch.arange(1000)
    words = reference.random_words(torch.tensor([1]), torch.tensor(0), rows, columns).flatten()
    assert words.unique().numel() > 0.9999 * words.numel()
    assert abs(words.double().mean().item() / 2**32 - 0.5) < 4 / (12 * words.numel()) ** 0.5


def _dropped(dropout_p: float, width: int = WIDTH) -> Tensor:
    """What add_layer_norm's sum is of a stream of zeros and a branch of ones."""
    return add_layer_norm(torch.zeros(ROWS, width), torch.ones(ROWS, width), (width,), dropout_p=dropout_p)[1]


@needs_kernels
@pytest.mark.parametrize("width", [768, 1024])
def test_mask_is_the_references_on_every_level(width: int, level: str) -> None:
    torch.manual_seed(3)
    ours = _dropped(0.3, width)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    assert torch.equal(ours, reference.dropout_factors(seed, ours, 1, 0.3))


@needs_kernels
def test_mask_of_odd_widths_and_halves_is_the_references(level: str) -> None:
    seed = torch.tensor([-5])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 63, 65, 1000):
            zeros, ones = torch.zeros(9, width, dtype=dtype), torch.ones(9, width, dtype=dtype)
            summed = torch.ops.trilby.add_norm(zeros, ones, None, None, seed, 1, True, 1e-5, 0.5)[1]
            assert torch.equal(summed.float(), reference.dropout_factors(seed, summed, 1, 0.5))


@needs_kernels
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_rate_and_scale(dropout_p: float) -> None:
    ours = _dropped(dropout_p)
    deviation = (dropout_p * (1 - dropout_p) / ours.numel()) ** 0.5
    assert abs((ours == 0).double().mean().item() - dropout_p) < 5 * deviation
    assert ours[ours != 0].unique().tolist() == pytest.approx([1 / (1 - dropout_p)])


@needs_kernels
def test_one_drops_everything_and_zero_draws_nothing() -> None:
    assert torch.equal(_dropped(1.0), torch.zeros(ROWS, WIDTH))
    state = torch.get_rng_state()
    assert torch.equal(_dropped(0.0), torch.ones(ROWS, WIDTH))
    assert torch.equal(torch.get_rng_state(), state)


@needs_kernels
@pytest.mark.usefixtures("threads")
def test_manual_seed_reproduces_whatever_the_threads() -> None:
    masks = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(11)
        masks.append(_dropped(0.5))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], _dropped(0.5))


@needs_kernels
@pytest.mark.parametrize("function", [add_layer_norm, add_rms_norm])
def test_gradients_see_the_mask_of_the_forward(function: Callable[..., tuple[Tensor, Tensor]], level: str) -> None:
    stream, branch = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    first, second = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    torch.manual_seed(4)
    outputs = function(stream, branch, (WIDTH,), dropout_p=0.25)
    grad_stream, grad_branch = torch.autograd.grad(outputs, (stream, branch), (first, second))
    torch.manual_seed(4)
    factors = reference.dropout_factors(torch.randint(2**63 - 1, (1,)), branch, 1, 0.25)
    assert torch.equal(grad_branch, grad_stream * factors)
    torch.testing.assert_close(outputs[1], stream + branch * factors)


@needs_kernels
def test_checkpointing_recomputes_the_same_gradients() -> None:
    stream, branch = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))

    def block(stream: Tensor, branch: Tensor) -> Tensor:
        normalized, summed = add_layer_norm(stream, branch, (WIDTH,), dropout_p=0.5)
        return normalized * summed

    gradients = []
    for run in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=False)):
        torch.manual_seed(9)
        gradients.append(torch.autograd.grad(run(stream, branch).sum(), (stream, branch)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@needs_kernels
@pytest.mark.parametrize("function", [add_layer_norm, add_rms_norm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_branch_in_half_precision_is_added_to_a_wider_stream(
    function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, dropout_p: float
) -> None:
    stream = torch.randn(ROWS, WIDTH, requires_grad=True)
    branch = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    first, second = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    results = []
    for summand in (branch, branch.float()):
        torch.manual_seed(6)
        outputs = function(stream, summand, (WIDTH,), dropout_p=dropout_p)
        results.append((*outputs, *torch.autograd.grad(outputs, (stream, branch), (first, second))))
    assert [tensor.dtype for tensor in results[0]] == [torch.float32] * 3 + [dtype]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    narrow = torch.zeros(ROWS, WIDTH, dtype=dtype)
    assert function(narrow, stream.detach(), (WIDTH,))[1].dtype == torch.float32  # as PyTorch's sum


def test_fewer_elements_are_worth_a_kernel_where_a_mask_is_drawn() -> None:
    def reasons(rows: int, width: int) -> tuple[str, ...]:
        return norm_rules.reasons_for_pytorch(norm_rules.WITH_DROPOUT, torch.empty(rows, width), (width,))

    assert any("elements, fewer than 8192" in reason for reason in reasons(8, 768))
    assert any("fewer than 32" in reason for reason in reasons(2**12, 8))
    if NATIVE.loaded:
        assert reasons(64, 768) == ()
        assert reasons(64, 1000) == ()


def test_small_calls_use_pytorchs_dropout() -> None:
    stream, branch = torch.randn(4, 8), torch.randn(4, 8)
    torch.manual_seed(2)
    _, summed = add_layer_norm(stream, branch, (8,), dropout_p=0.5)
    torch.manual_seed(2)
    assert torch.equal(summed, stream + F.dropout(branch, 0.5))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5])
def test_dropout_p_must_be_a_probability(dropout_p: float) -> None:
    for rows in (4, ROWS):
        with pytest.raises(ValueError, match="probability"):
            add_layer_norm(torch.zeros(rows, WIDTH), torch.zeros(rows, WIDTH), (WIDTH,), dropout_p=dropout_p)
