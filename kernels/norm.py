"""Layer norm and RMS norm, alone or with the residual add before them: check a call, choose who computes it, call them.

PyTorch's own functions are the specification: whatever trilby has no faster kernel for runs them, with their errors.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import NATIVE

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A CPU call of fewer elements is over sooner in PyTorch: entering an operator from Python costs more than it saves.
FEWEST_ELEMENTS = 32768


def reasons_for_pytorch(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> Iterator[str]:
    """Every reason why a norm of `input` is PyTorch's to compute; none: trilby computes it."""
    if input.is_cpu and input.numel() < FEWEST_ELEMENTS:
        yield f"input has {input.numel()} elements, fewer than {FEWEST_ELEMENTS}"
    if input.dtype not in KERNEL_DTYPES:
        yield f"input's dtype is {input.dtype}, not float32, bfloat16 or float16"
    if input.is_cpu and not NATIVE.loaded:
        yield NATIVE.reason
    if input.device.type not in ("cpu", "cuda"):
        yield f"trilby has no kernel for {input.device.type}"
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        yield "autocast, on CUDA, computes norms in float32"
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else ()
    if not shape or input.shape[-len(shape) :] != shape:
        yield f"normalized_shape is {normalized_shape}, and input {list(input.shape)}"
    if input.numel() == 0:
        yield "input is empty"
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    for parameter in parameters:
        if parameter.shape != shape:
            yield f"weight or bias is {list(parameter.shape)}, and normalized_shape {list(shape)}"
        if parameter.dtype not in (input.dtype, torch.float32) or parameter.dtype != parameters[0].dtype:
            yield f"weight or bias is {parameter.dtype}, and input {input.dtype}"
        if parameter.device != input.device:
            yield "weight or bias is on another device than input"


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
    for _ in reasons_for_pytorch(input, normalized_shape, weight, bias):
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, torch.backends.cudnn.enabled)
    normalized: Tensor = torch.ops.trilby.norm(input, weight, bias, len(normalized_shape), True, eps)[0]
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
    for _ in reasons_for_pytorch(input, normalized_shape, weight):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    eps = _rms_eps(eps, input.dtype)
    normalized: Tensor = torch.ops.trilby.norm(input, weight, None, len(normalized_shape), False, eps)[0]
    return normalized


def _reasons_to_add_first(stream: Tensor, branch: Tensor) -> Iterator[str]:
    """Every reason why `stream + branch` is PyTorch's to compute."""
    if stream.shape != branch.shape:
        yield f"stream is {list(stream.shape)}, and branch {list(branch.shape)}"
    if stream.dtype != branch.dtype:
        yield f"stream is {stream.dtype}, and branch {branch.dtype}"
    if stream.device != branch.device:
        yield "stream and branch are on different devices"


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """[1] int64 from torch's generator; none without dropout."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p was {dropout_p}; it is a probability, from 0 to 1")
    return torch.randint(2**63 - 1, (1,), device=device) if dropout_p else None


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
        branch: What the last block adds to it; same size and dtype.
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
    for _ in _reasons_to_add_first(stream, branch):
        summed = stream + F.dropout(branch, dropout_p)
        return layer_norm(summed, normalized_shape, weight, bias, eps), summed
    for _ in reasons_for_pytorch(stream, normalized_shape, weight, bias):
        summed = stream + F.dropout(branch, dropout_p)
        return torch.layer_norm(summed, normalized_shape, weight, bias, eps, torch.backends.cudnn.enabled), summed
    seed = _seed(dropout_p, stream.device)
    dims = len(normalized_shape)
    results: tuple[Tensor, ...] = torch.ops.trilby.add_norm(
        stream, branch, weight, bias, seed, dims, True, eps, dropout_p
    )
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
        branch: What the last block adds to it; same size and dtype.
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
    for _ in _reasons_to_add_first(stream, branch):
        summed = stream + F.dropout(branch, dropout_p)
        return rms_norm(summed, normalized_shape, weight, eps), summed
    for _ in reasons_for_pytorch(stream, normalized_shape, weight):
        summed = stream + F.dropout(branch, dropout_p)
        return torch.rms_norm(summed, normalized_shape, weight, eps), summed
    eps = _rms_eps(eps, stream.dtype)
    seed = _seed(dropout_p, stream.device)
    dims = len(normalized_shape)
    results: tuple[Tensor, ...] = torch.ops.trilby.add_norm(
        stream, branch, weight, None, seed, dims, False, eps, dropout_p
    )
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
