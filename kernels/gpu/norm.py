"""Norms on a GPU: check the tensors, choose the launch, allocate the results, run the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .norm_backward import NormGradients, NormInputs, column_sums_call, norm_backward_calls, parts_of
from .norm_forward import Dropout, NormResults, norm_forward_call
from .norm_launch import NormTiles, norm_backward_tiles, norm_forward_tiles
from .repeat import Work, perform
from .targets import device_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 65536


def norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_dims: int,
    centered: bool,
    eps: float,
    tiles: NormTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm, or RMS norm where not `centered`: what `torch.ops.trilby.norm` means.

    Args:
        input: [leading dimensions, normalized dimensions], float16, bfloat16 or float32, of any strides; up to 65,536
            elements are normalized together.
        weight: [normalized dimensions], of any of the three dtypes; none counts as 1.
        bias: [normalized dimensions], of any of the three dtypes; none counts as 0.
        normalized_dims: How many of the last dimensions make a row.
        centered: Subtract the mean (layer norm; `F.rms_norm` does not).
        eps: What is added to the variance.
        tiles: Launch parameters other than the table's.

    Returns:
        The normalized input, contiguous and in its dtype, mean (empty unless centered) and 1 / sqrt(variance + eps),
        both [leading dimensions] in float32.

    Raises:
        TypeError: A dtype that is none of the three.
        ValueError: Shapes that do not fit, or a device that has no kernel.
    """
    tensors = (input, None, weight, bias, None)
    normalized, _, mean, rstd = perform(_forward, tensors, (normalized_dims, centered, eps, 0.0, tiles))
    return normalized, mean, rstd


def add_norm(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_dims: int,
    centered: bool,
    eps: float,
    dropout_p: float,
    tiles: NormTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm` of summed = stream + dropout(branch), and summed itself, in one pass: `torch.ops.trilby.add_norm`.

    Args:
        stream: As `norm`'s input.
        branch: The same shape and dtype, of any strides.
        weight: As `norm`'s.
        bias: As `norm`'s.
        seed: [1] int64 on the same device: which elements dropout drops; none without dropout.
        normalized_dims: As `norm`'s.
        centered: As `norm`'s.
        eps: As `norm`'s.
        dropout_p: The probability that an element of `branch` is dropped.
        tiles: Launch parameters other than the table's.

    Returns:
        The normalized sum and the sum, contiguous and in stream's dtype, and the statistics of the rounded sum, as
        `norm`'s.

    Raises:
        TypeError, ValueError: As `norm`; or branch is not like stream.
    """
    if branch.shape != stream.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)} and stream {tuple(stream.shape)}; they must be equal")
    if branch.dtype != stream.dtype:
        raise TypeError(f"branch is {branch.dtype} and stream is {stream.dtype}; they must be the same")
    tensors = (stream, branch, weight, bias, seed)
    normalized, summed, mean, rstd = perform(_forward, tensors, (normalized_dims, centered, eps, dropout_p, tiles))
    return normalized, summed, mean, rstd


def norm_backward(
    grad_normalized: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_dims: int,
    centered: bool,
    dropout_p: float,
    tiles: NormTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `norm` and `add_norm`: `torch.ops.trilby.norm_backward`, the same bits on every run.

    Args:
        grad_normalized: The gradient of the normalized output, of any strides.
        grad_summed: The gradient of the sum, where it is used further, of any strides.
        summed: What was normalized (`norm`'s input).
        mean: From the forward.
        rstd: From the forward.
        weight: From the forward.
        bias: From the forward; only its shape and dtype matter.
        seed: From the forward.
        normalized_dims: From the forward.
        centered: From the forward.
        dropout_p: From the forward.
        tiles: Launch parameters other than the table's.

    Returns:
        The gradients of stream (or input), branch, weight and bias. That of an absent weight or bias is empty ([0]); so
        is that of the branch without dropout, when it equals that of the stream.

    Raises:
        TypeError, ValueError: As `norm`; or a gradient is not like what it is the gradient of.
    """
    tensors = (grad_normalized, grad_summed, summed, mean, rstd, weight, bias, seed)
    grad_stream, grad_branch, grad_weight, grad_bias = perform(
        _backward, tensors, (normalized_dims, centered, dropout_p, tiles)
    )
    return grad_stream, grad_branch, grad_weight, grad_bias


def _backward(tensors: Sequence[Any], numbers: Sequence[Any]) -> Work:
    grad_normalized, grad_summed, summed, mean, rstd, weight, bias, seed = tensors
    normalized_dims, centered, dropout_p, tiles = numbers
    check_norm(summed, weight, bias, normalized_dims)
    for name, gradient in (("grad_normalized", grad_normalized), ("grad_summed", grad_summed)):
        if gradient is not None and gradient.shape != summed.shape:
            raise ValueError(f"{name} has shape {tuple(gradient.shape)}; it must be {tuple(summed.shape)}")
        if gradient is not None and gradient.dtype not in DTYPES:
            raise TypeError(f"{name} is {gradient.dtype}; {', '.join(map(str, DTYPES))} are supported")
    rows = as_rows(summed, normalized_dims)
    M, N = rows.shape
    tiles = tiles or norm_backward_tiles(device_of(summed, "summed"), N)
    absent = summed.new_empty(0)
    grad_stream = torch.empty_like(summed, memory_format=torch.contiguous_format)
    grad_branch = absent if seed is None else torch.empty_like(grad_stream)
    grad_weight = absent.clone() if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = absent.clone() if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    parts = rows.new_empty(2, parts_of(M, N, tiles), N, dtype=torch.float32)
    weight_parts, bias_parts = parts
    calls = norm_backward_calls(
        NormInputs(
            as_rows(grad_normalized, normalized_dims),
            None if grad_summed is None else as_rows(grad_summed, normalized_dims),
            rows,
            mean.reshape(-1) if centered else None,
            rstd.reshape(-1),
            _flat(weight),
        ),
        NormGradients(
            grad_stream,
            None if seed is None else grad_branch,
            None if weight is None else weight_parts,
            None if bias is None else bias_parts,
        ),
        Dropout(seed, dropout_p),
        tiles,
    )
    if weight is not None or bias is not None:
        calls.append(
            column_sums_call(parts, None if weight is None else grad_weight, None if bias is None else grad_bias)
        )
    return Work((grad_stream, grad_branch, grad_weight, grad_bias), calls, (parts, weight_parts, bias_parts))


def _forward(tensors: Sequence[Any], numbers: Sequence[Any]) -> Work:
    stream, branch, weight, bias, seed = tensors
    normalized_dims, centered, eps, dropout_p, tiles = numbers
    check_norm(stream, weight, bias, normalized_dims)
    leading = stream.shape[: stream.dim() - normalized_dims]
    normalized = torch.empty_like(stream, memory_format=torch.contiguous_format)
    summed = torch.empty_like(normalized) if branch is not None else normalized.new_empty(0)
    mean = normalized.new_empty(leading if centered else (0,), dtype=torch.float32)
    rstd = normalized.new_empty(leading, dtype=torch.float32)
    rows = as_rows(stream, normalized_dims)
    call = norm_forward_call(
        rows,
        None if branch is None else as_rows(branch, normalized_dims),
        (_flat(weight), _flat(bias)),
        Dropout(seed, dropout_p),
        eps,
        NormResults(normalized, summed if branch is not None else None, mean if centered else None, rstd),
        tiles or norm_forward_tiles(device_of(stream, "input"), rows.shape[1], seed is not None),
    )
    return Work((normalized, summed, mean, rstd), (call,))


def as_rows(tensor: Tensor, normalized_dims: int) -> Tensor:
    """[M, N], without a copy wherever strides can say it; PyTorch's own norms copy whatever is not contiguous."""
    width = math.prod(tensor.shape[tensor.dim() - normalized_dims :])
    return tensor.reshape(math.prod(tensor.shape[: tensor.dim() - normalized_dims]), width)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1).contiguous()


def check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_dims: int) -> None:
    """Refuse what the kernels would compute wrongly.

    Raises:
        TypeError, ValueError: As `norm` says.
    """
    if not 1 <= normalized_dims <= input.dim():
        raise ValueError(f"normalized_dims is {normalized_dims}; 1 to {input.dim()}, input's dimensions, are allowed")
    shape = input.shape[input.dim() - normalized_dims :]
    if math.prod(shape) > MAX_WIDTH:
        raise ValueError(f"{math.prod(shape)} elements are normalized together; at most {MAX_WIDTH} are supported")
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; {', '.join(map(str, DTYPES))} are supported")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device} and input is on {input.device}")
        if tensor is not input and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
