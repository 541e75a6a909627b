"""Layer norm and RMS norm, alone or with the residual add before them: check a call, choose who computes it, call them.

PyTorch's own functions are the specification: whatever trilby has no faster kernel for runs them, with their errors.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norm_rules import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    KERNEL_DTYPES,
    LAYER_NORM,
    RMS_NORM,
    WITH_DROPOUT,
    Limits,
    reasons_for_pytorch,
)
from .observer import LIBRARIES, hand_over
from .seed import draw_seed
from .shortcut import short_way

_norm = short_way("norm", tensors=3)
_add_norm = short_way("add_norm", tensors=5)


def _is_small(input: Tensor, limits: Limits) -> bool:
    """The cheapest question first, 0.3 µs; all those of `reasons_for_pytorch` take 2, PyTorch's whole small call 4.

    Who watches is told all of them.
    """
    return input.numel() < limits.fewest.get(input.dtype, 0) and input.is_cpu and not LIBRARIES


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / √(variance + eps) · weight + bias along the last dimensions: `F.layer_norm`, faster.

    Arguments, results, errors and gradients are those of `torch.nn.functional.layer_norm`. Mean, variance and the
    gradients of weight and bias are summed in float32, and are the same bit by bit for every number of threads.

    Args:
        input: [leading dimensions, *normalized_shape]; float32, bfloat16 or float16 for trilby's kernels.
        normalized_shape: The dimensions that make a row.
        weight: [*normalized_shape], in input's dtype or float32.
        bias: [*normalized_shape], in weight's dtype.
        eps: What is added to the variance.

    Returns:
        The size and dtype of input, contiguous.

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    if _is_small(input, LAYER_NORM):
        # On a CPU there is no cuDNN to enable, and to look that up costs as much as the question above.
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, False)
    if reasons := reasons_for_pytorch(LAYER_NORM, input, normalized_shape, weight, bias):
        return hand_over(
            reasons,
            lambda: torch.layer_norm(input, normalized_shape, weight, bias, eps, torch.backends.cudnn.enabled),
        )
    normalized: Tensor = _norm(input, weight, bias, len(normalized_shape), True, eps)[0]
    return normalized


def _rms_eps(eps: float | None, dtype: torch.dtype) -> float:
    """PyTorch's default: the machine epsilon of the dtype that is computed with."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float32 if dtype in KERNEL_DTYPES else dtype).eps


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Input / √(mean square + eps) · weight along the last dimensions: `F.rms_norm`, faster.

    Arguments, results, errors and gradients are those of `torch.nn.functional.rms_norm`; see `layer_norm`.

    Args:
        input: [leading dimensions, *normalized_shape]; float32, bfloat16 or float16 for trilby's kernels.
        normalized_shape: The dimensions that make a row.
        weight: [*normalized_shape], in input's dtype or float32.
        eps: What is added to the mean square; the machine epsilon of float32 by default.

    Returns:
        The size and dtype of input, contiguous.

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    if _is_small(input, RMS_NORM):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    if reasons := reasons_for_pytorch(RMS_NORM, input, normalized_shape, weight):
        return hand_over(reasons, lambda: torch.rms_norm(input, normalized_shape, weight, eps))
    eps = _rms_eps(eps, input.dtype)
    normalized: Tensor = _norm(input, weight, None, len(normalized_shape), False, eps)[0]
    return normalized


def _reasons_to_add_first(stream: Tensor, branch: Tensor) -> Iterator[str]:
    """Every reason why `stream + branch` is PyTorch's to compute."""
    if stream.shape != branch.shape:
        yield f"stream is {list(stream.shape)}, and branch {list(branch.shape)}"
    if stream.dtype != torch.promote_types(stream.dtype, branch.dtype):
        yield f"stream is {stream.dtype}, and branch {branch.dtype}"
    if stream.device != branch.device:
        yield "stream and branch are on different devices"


def _pytorchs_sum(stream: Tensor, branch: Tensor, dropout_p: float) -> Tensor:
    """`stream + F.dropout(branch, dropout_p)`, without the call that drops nothing."""
    return stream + (F.dropout(branch, dropout_p) if dropout_p else branch)


def add_layer_norm(
    stream: Tensor,
    branch: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Layer norm of stream + dropout(branch), and that sum, in one pass over memory: a pre-norm block's residual.

    Equal to `summed = stream + F.dropout(branch, dropout_p); normalized = F.layer_norm(summed, ...)`. What is dropped
    follows from torch's random generator (`torch.manual_seed`) and from an element's position, whatever the number of
    threads; the mask takes no memory, for the backward computes it again. It is another mask than F.dropout's.

    Args:
        stream: The residual stream, [leading dimensions, *normalized_shape]; float32, bfloat16 or float16 for trilby's
            kernels.
        branch: What the last block adds to it; same size, and a dtype that does not widen stream's.
        normalized_shape: The dimensions that make a row.
        weight: [*normalized_shape], in stream's dtype or float32.
        bias: [*normalized_shape], in weight's dtype.
        eps: What is added to the variance.
        dropout_p: The probability that an element of branch is dropped; 0 when not training.

    Returns:
        (normalized, summed), both of the size and dtype of stream.

    Raises:
        ValueError: If dropout_p is not a probability.
        RuntimeError: Whatever PyTorch's functions raise, for what they refuse.
    """
    limits = WITH_DROPOUT if dropout_p > 0 else ADD_LAYER_NORM
    if _is_small(stream, limits):  # before any other question, or it is slower than two calls: 0.8 at (8, 32)
        summed = stream + branch if not dropout_p else _pytorchs_sum(stream, branch, dropout_p)
        return torch.layer_norm(summed, normalized_shape, weight, bias, eps, False), summed
    if any(_reasons_to_add_first(stream, branch)):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return layer_norm(summed, normalized_shape, weight, bias, eps), summed
    if reasons := reasons_for_pytorch(limits, stream, normalized_shape, weight, bias):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return hand_over(
            reasons,
            lambda: torch.layer_norm(summed, normalized_shape, weight, bias, eps, torch.backends.cudnn.enabled),
        ), summed
    seed = draw_seed(dropout_p, stream.device)
    dims = len(normalized_shape)
    branch = branch.to(stream.dtype)  # autocast computes branches in half precision
    results: tuple[Tensor, ...] = _add_norm(stream, branch, weight, bias, seed, dims, True, eps, dropout_p)
    return results[0], results[1]


def add_rms_norm(
    stream: Tensor,
    branch: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """RMS norm of stream + dropout(branch), and that sum, in one pass over memory; see `add_layer_norm`.

    Args:
        stream: The residual stream, [leading dimensions, *normalized_shape]; float32, bfloat16 or float16 for trilby's
            kernels.
        branch: What the last block adds to it; same size, and a dtype that does not widen stream's.
        normalized_shape: The dimensions that make a row.
        weight: [*normalized_shape], in stream's dtype or float32.
        eps: What is added to the mean square; the machine epsilon of float32 by default.
        dropout_p: The probability that an element of branch is dropped; 0 when not training.

    Returns:
        (normalized, summed), both of the size and dtype of stream.

    Raises:
        ValueError: If dropout_p is not a probability.
        RuntimeError: Whatever PyTorch's functions raise, for what they refuse.
    """
    limits = WITH_DROPOUT if dropout_p > 0 else ADD_RMS_NORM
    if _is_small(stream, limits):
        summed = stream + branch if not dropout_p else _pytorchs_sum(stream, branch, dropout_p)
        return torch.rms_norm(summed, normalized_shape, weight, eps), summed
    if any(_reasons_to_add_first(stream, branch)):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return rms_norm(summed, normalized_shape, weight, eps), summed
    if reasons := reasons_for_pytorch(limits, stream, normalized_shape, weight):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return hand_over(reasons, lambda: torch.rms_norm(summed, normalized_shape, weight, eps)), summed
    eps = _rms_eps(eps, stream.dtype)
    seed = draw_seed(dropout_p, stream.device)
    dims = len(normalized_shape)
    branch = branch.to(stream.dtype)
    results: tuple[Tensor, ...] = _add_norm(stream, branch, weight, None, seed, dims, False, eps, dropout_p)
    return results[0], results[1]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by `layer_norm`: the same arguments, parameters and state."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions of input [leading dimensions, *normalized_shape]."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by `rms_norm`: the same arguments, parameters and state."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions of input [leading dimensions, *normalized_shape]."""
        return rms_norm(input, self.normalized_shape, self.weight, self.eps)
