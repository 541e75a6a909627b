"""The linear layer of few rows, which waits for its weights: check a call, choose who computes it, call them.

PyTorch's own function is the specification: whatever trilby has no faster kernel for runs it, with its errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .observer import LIBRARIES, hand_over_unseen
from .ops import reasons_against_device
from .shortcut import reasons_of_context, short_way
from .wide_product import linear as _pytorchs

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of input up to which waiting for the weights is all there is to it. Measured on one thread without AMX, PyTorch's
# time over trilby's with 1, 4, 8 and 16 rows, N = 768, K = 3072: float32 1.0, 1.5, 1.5, 0.9; bfloat16 1.7, 1.9, 1.7,
# 1.3; int8, against torch._weight_int8pack_mm on bfloat16, 1.5, 1.6, 1.7, 1.4.
# Quantized weights are made floats again for PyTorch: that and its product over trilby's, with 16, 32, 64 and 128 rows,
# N = 2304, K = 768: 5.2, 6.8, 3.2, 2.0 in float32, 9.5, 8.2, 3.9, 2.3 in bfloat16.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 8, torch.int8: 128}
# Weights below which a call is over sooner in PyTorch: entering an operator from Python costs more than it saves.
# Measured as above, PyTorch's time over trilby's with 1 (and 4) rows of 256, 512, 768 and 1024 numbers, as many
# weights: float32 0.5 (0.5), 0.8 (0.6), 0.8 (1.2), 0.8 (1.5); bfloat16 1.8 (1.8), 2.0 (1.9), 2.2 (1.9), 1.9 (1.9);
# float16 0.8 (1.8), 1.3 (1.8), 1.8 (2.0), 1.7 (2.1); int8 against float32 0.5 (0.4), 0.7 (0.6), 1.6 (1.7), 1.9 (2.6).
FEWEST_WEIGHTS = {torch.float32: 2**20, torch.bfloat16: 2**16, torch.float16: 2**18, torch.int8: 0}
# PyTorch reads the weights of one or two rows in float32 nearly as fast: 1.0 with 2.4 million, 1.07 with 39 million.
FEW_ROWS_OF_FLOAT32, FEWEST_WEIGHTS_OF_FEW_ROWS = 2, 2**22

Size = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

_linear = short_way("linear", tensors=4)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of weights as 8-bit integers, a quarter of float32's memory: weight[n, k] ≈ values[n, k] · scales[n].

    Attributes:
        values: [N, K] int8, from -127 to 127.
        scales: [N] float32.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.dim() != 2:
            raise ValueError(f"values was {list(self.values.shape)} {self.values.dtype}; it must be [N, K] torch.int8")
        if self.scales.dtype != torch.float32 or self.scales.shape != self.values.shape[:1]:
            wanted = f"[{len(self.values)}] torch.float32"
            raise ValueError(f"scales was {list(self.scales.shape)} {self.scales.dtype}; it must be {wanted}")

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the integers stand for, [N, K] in `dtype`."""
        return (self.values * self.scales.unsqueeze(1)).to(dtype)


def quantize_rows(weight: Tensor) -> QuantizedWeight:
    """Round each row of `weight` to 255 levels between plus and minus its largest magnitude.

    A weight moves by at most half a level, max|row| / 254; so does an output, times the sum of |input|. For GPT-2's
    rows, normal numbers whose largest is near 3.5 deviations, that is a relative error of an output of 0.8 %.

    Args:
        weight: [N, K], float32, bfloat16 or float16, finite.

    Returns:
        The integers and one scale a row; a row of zeros has the scale 1.

    Raises:
        ValueError: If weight is no matrix of those dtypes, or not finite.
    """
    if weight.dim() != 2 or weight.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"weight was {list(weight.shape)} {weight.dtype}; it must be [N, K], float32, bfloat16 or float16"
        )
    exact = weight.detach().float()
    if not exact.isfinite().all():
        raise ValueError("weight holds an infinity or a NaN, which no integer stands for")
    largest = exact.abs().amax(1) if weight.shape[1] else exact.new_zeros(len(exact))
    scales = torch.where(largest > 0, largest / 127, 1.0)
    return QuantizedWeight((exact / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales)


def fewest_weights(rows: int, dtype: torch.dtype) -> int:
    """The smallest matrix of `dtype` that trilby multiplies with `rows` rows of input."""
    if dtype == torch.float32 and rows <= FEW_ROWS_OF_FLOAT32:
        return FEWEST_WEIGHTS_OF_FEW_ROWS
    return FEWEST_WEIGHTS[dtype]


def reasons_for_pytorch(input: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> tuple[str, ...]:
    """Every reason why a call of `linear` is PyTorch's to compute; none: trilby computes it."""
    values, scales = (weight.values, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)
    differentiated = torch.is_grad_enabled() and (
        input.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )
    autocast = input.is_cpu and torch.is_autocast_enabled("cpu")
    arguments = (_size(input), _size(values), _size(bias), _size(scales), differentiated, autocast)
    if torch.compiler.is_compiling():  # sizes are symbols there, and the answer a guard
        return tuple(_reasons(*arguments))  # type: ignore[arg-type]
    return reasons_of_context() + _remembered_reasons(*arguments)


def _size(tensor: Tensor | None) -> Size | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _reasons(
    input: Size, weight: Size, bias: Size | None, scales: Size | None, differentiated: bool, autocast: bool
) -> Iterator[str]:
    given = [size for size in (input, weight, bias, scales) if size is not None]
    yield from _reasons_of_dtypes([dtype for _, _, dtype, _ in given], scales is not None)
    device = input[3]
    if any(other != device for *_, other in given):
        yield f"devices are {', '.join(str(other) for *_, other in given)}, not one"
    if device.type != "cpu":
        yield f"trilby has no kernel for {device.type}"
        return
    yield from reasons_against_device(device)
    if differentiated:
        yield "gradients are asked for"
    if autocast:
        yield "autocast chooses the dtype"
    if not input[0] or len(weight[0]) != 2 or input[0][-1] != weight[0][1]:
        yield f"input is {list(input[0])}, and weight {list(weight[0])}"
        return
    N, K = weight[0]
    if bias is not None and bias[0] != (N,):
        yield f"bias is {list(bias[0])}, and weight {[N, K]}"
    if (K > 1 and weight[1][1] != 1) or (N > 1 and any(size[1] != (1,) for size in given[2:])):
        yield "the elements of a row of weight, or of bias or scales, are apart"
    if weight[2] in MOST_ROWS:
        yield from _reasons_by_size(input[0][:-1].numel(), N * K, weight[2])


def _reasons_of_dtypes(dtypes: list[torch.dtype], quantized: bool) -> Iterator[str]:
    wanted = {dtypes[0], torch.int8, torch.float32} if quantized else {dtypes[0]}
    if dtypes[0] not in KERNEL_DTYPES or not set(dtypes) <= wanted:
        yield f"dtypes are {', '.join(map(str, dtypes))}, not all one of float32, bfloat16, float16"


def _reasons_by_size(rows: int, weights: int, dtype: torch.dtype) -> Iterator[str]:
    if rows == 0 or weights == 0:
        yield "a size is zero"
    if rows > MOST_ROWS[dtype]:
        yield f"input has {rows} rows, more than {MOST_ROWS[dtype]}"
    if weights < fewest_weights(rows, dtype):
        yield f"there are {weights} weights, fewer than {fewest_weights(rows, dtype)}"


@lru_cache(4096)
def _remembered_reasons(*arguments: object) -> tuple[str, ...]:
    return tuple(_reasons(*arguments))  # type: ignore[arg-type]


def linear(input: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Input · weightᵀ + bias: `F.linear`, faster for the few rows of a token that is generated.

    Arguments, results, errors and gradients are those of `torch.nn.functional.linear`, but that weights may be 8-bit
    integers. Sums are taken in float32, and trilby's are the same bit by bit for every number of threads and of rows.
    Where a processor multiplies bfloat16 more slowly than float32, PyTorch's products of it, autocast's too, are
    widened (`wide_product.py`).

    Args:
        input: [..., K]; float32, bfloat16 or float16 for trilby's kernel.
        weight: [N, K] in input's dtype, or what `quantize_rows` makes of such a matrix. Many rows of input with
            quantized weights are multiplied with `weight.dequantized(input.dtype)`, by PyTorch.
        bias: [N] in input's dtype.

    Returns:
        [..., N] in input's dtype.

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    if isinstance(weight, QuantizedWeight):
        if reasons := reasons_for_pytorch(input, weight, bias):
            quantized = weight
            arguments = {"input": input, "weight": weight.values, "bias": bias}
            return hand_over_unseen(
                "aten::linear", arguments, reasons, lambda: _pytorchs(input, quantized.dequantized(input.dtype), bias)
            )
        return _linear(input, weight.values, bias, weight.scales)  # type: ignore[no-any-return]
    # The cheapest question first.
    if weight.is_cpu and weight.numel() < FEWEST_WEIGHTS.get(weight.dtype, 0) and not LIBRARIES:
        return _pytorchs(input, weight, bias)
    if reasons := reasons_for_pytorch(input, weight, bias):
        matrix = weight
        arguments = {"input": input, "weight": weight, "bias": bias}
        return hand_over_unseen("aten::linear", arguments, reasons, lambda: _pytorchs(input, matrix, bias))
    return _linear(input, weight, bias, None)  # type: ignore[no-any-return]
