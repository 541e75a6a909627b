"""GELU between the two products of a feed-forward layer: check a call, choose who computes it, call them.

PyTorch's own function is the specification: whatever trilby has no faster kernel for runs it, with its errors.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .observer import hand_over_unseen
from .ops import reasons_against_device
from .shortcut import reasons_of_context, short_way

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A call of fewer elements is over sooner in PyTorch: entering an operator from Python costs more than it saves.
# Measured on one thread, PyTorch's time over trilby's, forward (and with the backward): in float32 0.55 (0.65) at 2^12,
# 1.05 (1.11) at 2^14, 2.5 (1.9) at 2^18.6, 2.9 (1.7) at 2^21.6; in bfloat16 0.6 (0.6), 0.9 (1.1), 2.0 (1.9), 2.7 (2.3).
FEWEST_ELEMENTS = 2**15

_gelu = short_way("gelu", tensors=1)


def gelu_reasons_for_pytorch(input: Tensor, approximate: str = "none") -> tuple[str, ...]:
    """Every reason why the GELU of `input` is PyTorch's to compute; none: trilby computes it."""
    reasons = []
    if approximate != "tanh":
        reasons.append(f"approximate is {approximate!r}, and trilby has a kernel for 'tanh'")
    if input.dtype not in KERNEL_DTYPES:
        reasons.append(f"input's dtype is {input.dtype}, not float32, bfloat16 or float16")
    if input.device.type != "cpu":
        reasons.append(f"input is on {input.device.type}, and trilby has a kernel for CPUs")
    if not input.is_contiguous():
        reasons.append("input is not contiguous")
    if input.numel() < FEWEST_ELEMENTS:
        reasons.append(f"input has {input.numel()} elements, fewer than {FEWEST_ELEMENTS}")
    return (*reasons, *reasons_against_device(input.device), *reasons_of_context())


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Input · Φ(input), or near it: `F.gelu`, faster for `approximate="tanh"`, the form that GPT-2 was trained with.

    Arguments, results, errors and gradients are those of `torch.nn.functional.gelu`. Computed in float32 whatever
    input's dtype, and the same bit by bit for every number of threads.

    Args:
        input: Of any size; float32, bfloat16 or float16, and contiguous, for trilby's kernel.
        approximate: "tanh" for trilby's kernel, or "none".

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    if reasons := gelu_reasons_for_pytorch(input, approximate):
        return hand_over_unseen("aten::gelu", {"input": input}, reasons, lambda: F.gelu(input, approximate=approximate))
    output: Tensor = _gelu(input)
    return output
