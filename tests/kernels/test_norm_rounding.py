"""Norms round to bfloat16 to the nearest even, bit by bit: ties, the way to infinity, subnormal numbers, NaNs.

The kernels round two registers at once, by a way of their own (csrc/pair.h). Inputs here make what is rounded known
exactly, so that PyTorch's conversion says every bit of the result.
"""

import pytest
import torch
from torch import Tensor
from trilby.kernels.ops import NATIVE

needs_kernels = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to test: {NATIVE.reason}")
# Whole registers; a rest at the end of each row; nothing else; wide rows, side by side; rows that pass the cache by.
each_size = pytest.mark.parametrize("size", [(64, 1024), (66, 1000), (2, 14), (9, 8192), (2049, 1024)], ids=str)


def any_bits(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every bit pattern of bfloat16 in turn; of float32 random ones, each fourth in the middle of two bfloat16s."""
    count = torch.Size(size).numel()
    high = torch.randperm(1 << 16).repeat(count // (1 << 16) + 1)[:count]
    if dtype == torch.bfloat16:
        return high.to(torch.int16).view(dtype).view(size)
    low = torch.where(torch.rand(count) < 0.25, 0x8000, torch.randint(1 << 16, (count,)))
    low = torch.where(high & 0x7F80 == 0x7F80, 0, low)  # infinity, and the NaNs that bfloat16 has
    return ((high << 16) | low).to(torch.int32).view(dtype).view(size)


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    assert torch.equal(ours.isnan(), expected.isnan())
    ours, expected = (torch.where(tensor.isnan(), 0, tensor).view(torch.int16) for tensor in (ours, expected))
    assert torch.equal(ours, expected)


@needs_kernels
@each_size
def test_a_sum_is_rounded_as_pytorch_rounds(size: tuple[int, int], level: str) -> None:
    stream = any_bits(size, torch.bfloat16)
    # Numbers of about the same size: their sums have bits that bfloat16 has not.
    branch = torch.where(torch.rand(size) < 0.9, stream.float() * torch.randn(size), any_bits(size, torch.bfloat16))
    branch = branch.to(torch.bfloat16)
    summed = torch.ops.trilby.add_norm(stream, branch, None, None, None, 1, True, 1e-5, 0.0)[1]
    assert_same_bits(summed, (stream.float() + branch.float()).to(torch.bfloat16))


@needs_kernels
@each_size
def test_a_normalized_row_is_rounded_as_pytorch_rounds(size: tuple[int, int], level: str) -> None:
    rows, width = size
    signs = torch.tensor([1.0, -1.0]).repeat(rows, width // 2)  # mean 0, variance 1: normalized, they are themselves
    weight = any_bits((width,), torch.float32)
    normalized = torch.ops.trilby.norm(signs.to(torch.bfloat16), weight, None, 1, True, 0.0)[0]
    assert_same_bits(normalized, (signs * weight).to(torch.bfloat16))


@needs_kernels
@each_size
def test_a_gradient_is_rounded_as_pytorch_rounds(size: tuple[int, int], level: str) -> None:
    stream, branch = (torch.randn(size).to(torch.bfloat16).requires_grad_() for _ in range(2))
    seed, p = torch.tensor([7]), 0.3
    outputs = torch.ops.trilby.add_norm(stream, branch, None, None, seed, 1, True, 1e-5, p)[:2]
    # The gradient of the sum alone: the stream's is that gradient, the branch's is what dropout makes of it.
    given = any_bits(size, torch.bfloat16)
    given = torch.where(given.isfinite(), given, 1.5)  # dropped, an infinity is a NaN
    zero = torch.zeros(size, dtype=torch.bfloat16)
    of_stream, of_branch = torch.autograd.grad(outputs, (stream, branch), (zero, given))
    assert_same_bits(of_stream, given + 0.0)  # 0 + -0 is 0
    kept = of_branch != 0
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32)
    assert_same_bits(of_branch[kept], (given.float() * scale).to(torch.bfloat16)[kept])


def test_truncation_would_be_noticed() -> None:
    """The bits that the tests above feed tell rounding to nearest even from truncation and from rounding ties up."""
    values = any_bits((1 << 16,), torch.float32).view(torch.int32)
    values = values[(values & 0x7F800000) != 0x7F800000]
    exact = values.view(torch.float32).to(torch.bfloat16).view(torch.int16)
    truncated = (values >> 16).to(torch.int16)
    ties_up = ((values + 0x8000) >> 16).to(torch.int16)
    assert not torch.equal(exact, truncated)
    assert not torch.equal(exact, ties_up)
