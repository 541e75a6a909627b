"""Layer norm and RMS norm, alone or with the residual add before them: check a call, choose who computes it, call them.

PyTorch's own functions are the specification: whatever trilby has no faster kernel for runs them, with their errors.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .observer import LIBRARIES, hand_over
from .ops import reasons_against_device
from .seed import draw_seed
from .shortcut import reasons_of_context, short_way

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A CPU call of fewer elements is over sooner in PyTorch: entering an operator from Python costs more than it saves.
# Measured on two threads with rows of 768, PyTorch's time over trilby's, forward (and with the backward): in float32
# 0.86 (0.79) at 2^18, 0.90 (0.82) at 2^18.6, 1.04 (0.96) at 2^19.6; in bfloat16 0.88 (0.80) at 2^16.6, 1.37 (1.20) at
# 2^18.2, 1.86 (1.68) at 2^19.6.
FEWEST_ELEMENTS = {torch.float32: 2**20, torch.bfloat16: 2**18, torch.float16: 2**18}
# With dropout: PyTorch draws its mask one element after the other, 6 ns each. With the backward, float32: 0.97 at
# (8, 768), 1.38 at (64, 768), 2.8 at (1024, 768); bfloat16 1.01, 1.51 and 2.6.
FEWEST_DROPPED = 2**13
# Two registers of the widest level: the C++ kernels step along a row by as much. Rows of 16: 1.1 (0.67) in float32.
NARROWEST_ROW = 32
# Rows that all begin on a line of the cache can be stored past it; others, in float32, gain nothing: 0.88 (1.01) at
# (4096, 1000).
LINE_BYTES = 64
WIDEST_ROW_ON_GPU = 65536  # gpu/norm.py holds a row in registers

Parameter = tuple[torch.Size, torch.dtype, torch.device]

_norm = short_way("norm", tensors=3)
_add_norm = short_way("add_norm", tensors=5)


def _is_small(input: Tensor, drops: bool = False) -> bool:
    """The cheapest question first, 0.3 µs; all those of `reasons_for_pytorch` take 2, PyTorch's whole small call 4.

    Who watches is told all of them.
    """
    fewest = FEWEST_DROPPED if drops else FEWEST_ELEMENTS.get(input.dtype, 0)
    return input.numel() < fewest and input.is_cpu and not LIBRARIES


def reasons_for_pytorch(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    drops: bool = False,
) -> tuple[str, ...]:
    """Every reason why a norm of `input`, after a dropout or not, is PyTorch's to compute; none: trilby computes it."""
    if not isinstance(normalized_shape, Sequence):
        return (f"normalized_shape is {normalized_shape!r}, not a sequence of sizes",)
    arguments = _described(input, normalized_shape, weight, bias)
    if torch.compiler.is_compiling():  # sizes are symbols there, and the answer a guard
        return tuple(_reasons(*arguments, drops))
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return ("autocast, on CUDA, computes norms in float32",)
    return reasons_of_context() + _remembered_reasons(*arguments, drops)


def reasons_against_kernel(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[str, ...]:
    """Every reason why no kernel of trilby's can compute a norm of `input`, of whatever size."""
    return tuple(_reasons_against_kernel(*_described(input, normalized_shape, weight, bias)))


def _described(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[torch.Size, torch.dtype, torch.device, tuple[int, ...], tuple[Parameter, ...]]:
    parameters = tuple((t.shape, t.dtype, t.device) for t in (weight, bias) if t is not None)
    return input.shape, input.dtype, input.device, tuple(normalized_shape), parameters


def _reasons(
    size: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    normalized_shape: tuple[int, ...],
    parameters: tuple[Parameter, ...],
    drops: bool,
) -> Iterator[str]:
    yield from _reasons_against_kernel(size, dtype, device, normalized_shape, parameters)
    if device.type == "cpu" and dtype in KERNEL_DTYPES:
        yield from _reasons_on_cpu(size.numel(), torch.Size(normalized_shape).numel(), dtype, drops)


def _reasons_against_kernel(
    size: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    normalized_shape: tuple[int, ...],
    parameters: tuple[Parameter, ...],
) -> Iterator[str]:
    if dtype not in KERNEL_DTYPES:
        yield f"input's dtype is {dtype}, not float32, bfloat16 or float16"
    yield from reasons_against_device(device)
    if not normalized_shape or size[-len(normalized_shape) :] != normalized_shape:
        yield f"normalized_shape is {list(normalized_shape)}, and input {list(size)}"
    if size.numel() == 0:
        yield "input is empty"
    for parameter_size, parameter_dtype, parameter_device in parameters:
        if parameter_size != normalized_shape:
            yield f"weight or bias is {list(parameter_size)}, and normalized_shape {list(normalized_shape)}"
        if parameter_dtype not in (dtype, torch.float32) or parameter_dtype != parameters[0][1]:
            yield f"weight or bias is {parameter_dtype}, and input {dtype}"
        if parameter_device != device:
            yield "weight or bias is on another device than input"
    width = torch.Size(normalized_shape).numel()
    if device.type == "cuda" and width > WIDEST_ROW_ON_GPU:
        yield f"a row has {width} elements, more than {WIDEST_ROW_ON_GPU}"


def _reasons_on_cpu(elements: int, width: int, dtype: torch.dtype, drops: bool) -> Iterator[str]:
    fewest = FEWEST_DROPPED if drops else FEWEST_ELEMENTS[dtype]
    if elements < fewest:
        yield f"input has {elements} elements, fewer than {fewest}"
    if width < NARROWEST_ROW:
        yield f"a row has {width} elements, fewer than {NARROWEST_ROW}"
    if dtype == torch.float32 and width * dtype.itemsize % LINE_BYTES and not drops:
        yield f"a row has {width * dtype.itemsize} bytes, no multiple of {LINE_BYTES}"


@lru_cache(4096)
def _remembered_reasons(*arguments: object) -> tuple[str, ...]:
    return tuple(_reasons(*arguments))  # type: ignore[arg-type]


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
    if _is_small(input):
        # On a CPU there is no cuDNN to enable, and to look that up costs as much as the question above.
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, False)
    if reasons := reasons_for_pytorch(input, normalized_shape, weight, bias):
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
    if _is_small(input):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    if reasons := reasons_for_pytorch(input, normalized_shape, weight):
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
    if _is_small(stream, dropout_p > 0):  # before any other question, or it is slower than two calls: 0.8 at (8, 32)
        summed = stream + branch if not dropout_p else _pytorchs_sum(stream, branch, dropout_p)
        return torch.layer_norm(summed, normalized_shape, weight, bias, eps, False), summed
    if any(_reasons_to_add_first(stream, branch)):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return layer_norm(summed, normalized_shape, weight, bias, eps), summed
    if reasons := reasons_for_pytorch(stream, normalized_shape, weight, bias, dropout_p > 0):
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
    if _is_small(stream, dropout_p > 0):
        summed = stream + branch if not dropout_p else _pytorchs_sum(stream, branch, dropout_p)
        return torch.rms_norm(summed, normalized_shape, weight, eps), summed
    if any(_reasons_to_add_first(stream, branch)):
        summed = _pytorchs_sum(stream, branch, dropout_p)
        return rms_norm(summed, normalized_shape, weight, eps), summed
    if reasons := reasons_for_pytorch(stream, normalized_shape, weight, None, dropout_p > 0):
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
