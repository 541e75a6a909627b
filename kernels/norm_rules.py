"""Who computes a norm, trilby or PyTorch: from which sizes on kernels are worth entering, and what they compute."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import reasons_against_device
from .shortcut import reasons_of_context

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINE_BYTES = 64  # of the cache: rows that all begin on one can be stored past it
WIDEST_ROW_ON_GPU = 65536  # gpu/norm.py holds a row in registers

Parameter = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True, eq=False)
class Limits:
    """What a norm on a CPU must at least be to be over sooner in trilby's kernels than in PyTorch.

    Attributes:
        fewest: Elements of the input, by its dtype.
        narrowest: Elements of a row.
        fewest_across_lines: Elements of the input, in float32, where rows begin amid lines of the cache.
    """

    fewest: Mapping[torch.dtype, int]
    narrowest: int
    fewest_across_lines: int = 0


def _limits(float32: int, bfloat16: int, float16: int, narrowest: int, fewest_across_lines: int = 0) -> Limits:
    return Limits(dict(zip(KERNEL_DTYPES, (float32, bfloat16, float16))), narrowest, fewest_across_lines)


# PyTorch's time over trilby's, forward (and with the backward), two threads of a Xeon with AMX, medians of a loop in
# turns. Rows of 768 unless told.

# PyTorch's is one kernel. float32: 0.96 (0.78) at 256 rows, 1.11 (0.99) at 512, 1.20 (1.11) at 1024; bfloat16 0.86
# (0.90) at 64, 1.23 (1.14) at 128; float16 1.07 (0.84) at 128, 1.40 (1.02) at 256. Rows of 8: 1.8 (3.3), bfloat16 3.9
# (7.7); of 16 2.3 (1.2) and 2.1 (3.5). Rows of 1000 in float32: 1.03 (0.98) at 393, 1.16 (1.21) at 1075, 1.39 (1.25) at
# 3145; of 4100 0.94 (1.05) at 262, 1.11 (1.31) at 1030.
LAYER_NORM = _limits(3 << 18, 3 << 15, 3 << 16, narrowest=8, fewest_across_lines=1 << 21)
# A sum, and that kernel. float32: 0.92 (0.93) at 256 rows, 1.05 (1.17) at 512; bfloat16 0.99 (1.00) at 64, 1.37 (1.17)
# at 128; float16 1.03 (0.92) at 128, 1.22 (1.22) at 256. Rows of 16: 1.2 (0.95) in float32. Rows of 1000: 1.07 (1.17)
# at 393, 1.22 (1.45) at 1075.
ADD_LAYER_NORM = _limits(3 << 17, 3 << 15, 3 << 16, narrowest=32)
# Half a dozen operators. float32: 0.98 (1.08) at 1 row, 1.02 (1.14) at 4, 1.08 (1.23) at 16, 1.87 (2.69) at 512;
# bfloat16 1.25 (1.31) at 1, 1.55 (1.47) at 16, and of 512 elements 1.27 (1.36); float16 of these 1.15 (1.27). Rows of
# 8: 1.1 (1.1) at 512, 2.1 (2.5) at 134400; of 1: 0.3 (0.3).
RMS_NORM = _limits(1 << 12, 1 << 9, 1 << 9, narrowest=8)
# A sum, and these. float32: 0.91 (1.16) at 16 rows, 1.02 (1.47) at 64; bfloat16 1.02 (1.23) at 1, 1.10 (1.26) at 4;
# float16 0.97 (1.22) at 2, 1.03 (1.23) at 6. Rows of 16: 0.9 (1.6) in float32.
ADD_RMS_NORM = _limits(3 << 14, 1 << 9, 1 << 12, narrowest=32)
# With either: PyTorch draws its mask one element after the other, 6 ns each. With the backward, float32: 0.97 at 8
# rows, 1.38 at 64, 2.8 at 1024; bfloat16 1.01, 1.51 and 2.6.
WITH_DROPOUT = _limits(1 << 13, 1 << 13, 1 << 13, narrowest=32)
# An RMS norm of a model that calls PyTorch's, in its place: 20 µs more. float32: 0.81 (1.78) at 64 rows, 0.94 (1.83) at
# 128, 1.58 (2.86) at 256; bfloat16 1.07 (1.20) at 16, 1.45 (2.12) at 64.
COMPOSED_RMS_NORM = _limits(1 << 17, 1 << 14, 1 << 14, narrowest=8)


def reasons_for_pytorch(
    limits: Limits,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[str, ...]:
    """Every reason why a norm of `input` is PyTorch's to compute, on a CPU below `limits`; none: trilby computes it."""
    if not isinstance(normalized_shape, Sequence):
        return (f"normalized_shape is {normalized_shape!r}, not a sequence of sizes",)
    described = _described(input, normalized_shape, weight, bias)
    if torch.compiler.is_compiling():  # sizes are symbols there, and the answer a guard
        return tuple(_reasons(limits, _Call(*described)))
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return ("autocast, on CUDA, computes norms in float32",)
    return reasons_of_context() + _remembered_reasons(limits, *described)


def reasons_against_kernel(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[str, ...]:
    """Every reason why no kernel of trilby's can compute a norm of `input`, of whatever size."""
    return tuple(_reasons_against_kernel(_Call(*_described(input, normalized_shape, weight, bias))))


class _Call(NamedTuple):
    """What who computes a norm depends on."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    normalized_shape: tuple[int, ...]
    parameters: tuple[Parameter, ...]  # weight and bias, those that are given

    @property
    def width(self) -> int:
        return torch.Size(self.normalized_shape).numel()


def _described(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """The fields of a `_Call`, which every call of a norm would wait 0.4 µs for."""
    parameters = tuple((t.shape, t.dtype, t.device) for t in (weight, bias) if t is not None)
    return input.shape, input.dtype, input.device, tuple(normalized_shape), parameters


def _reasons(limits: Limits, call: _Call) -> Iterator[str]:
    yield from _reasons_against_kernel(call)
    if call.device.type == "cpu" and call.dtype in KERNEL_DTYPES:
        yield from _reasons_on_cpu(limits, call.size.numel(), call.width, call.dtype)


def _reasons_against_kernel(call: _Call) -> Iterator[str]:
    size, dtype, device, normalized_shape, parameters = call
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
    if device.type == "cuda" and call.width > WIDEST_ROW_ON_GPU:
        yield f"a row has {call.width} elements, more than {WIDEST_ROW_ON_GPU}"


def _reasons_on_cpu(limits: Limits, elements: int, width: int, dtype: torch.dtype) -> Iterator[str]:
    if elements < limits.fewest[dtype]:
        yield f"input has {elements} elements, fewer than {limits.fewest[dtype]}"
    if width < limits.narrowest:
        yield f"a row has {width} elements, fewer than {limits.narrowest}"
    if dtype == torch.float32 and width * dtype.itemsize % LINE_BYTES and elements < limits.fewest_across_lines:
        yield (
            f"a row has {width * dtype.itemsize} bytes, no multiple of {LINE_BYTES}, and input {elements} elements, "
            f"fewer than {limits.fewest_across_lines}"
        )


@lru_cache(4096)
def _remembered_reasons(limits: Limits, *described: Any) -> tuple[str, ...]:
    return tuple(_reasons(limits, _Call(*described)))
