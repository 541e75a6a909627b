"""Products of bfloat16 where a processor multiplies float32 faster: the same product, widened, and rounded once.

Without AMX, PyTorch's bfloat16 products are the slower ones but on a Zen 4 and newer. Measured on one thread, 256 rows,
768 columns and 768 outputs, under autocast: on AVX2 (an EPYC) 31 ms forward and 301 backward, where float32 takes 3.5
and 9.6; on a Xeon with AVX512-BF16 a product of 160 x 768 and 50257 reaches 132 to 146 GFLOP/s, in float32 203 to 233;
on two cores of a Zen 4 373 to 386, in float32 102 to 165. An element of bfloat16 is one of float32 without its last 16
bits, so that widening is exact, and costs a pass over the operands.
"""

import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import NATIVE
from .shortcut import reasons_of_context

# Rows from which on widening weights that are bfloat16 themselves, 6 bytes moved for each, is worth its while.
FEWEST_ROWS = 16
# Whether this processor multiplies float32 faster than bfloat16.
BFLOAT16_IS_SLOW = (
    platform.machine().lower() in ("x86_64", "amd64")
    and not torch.cpu._is_amx_tile_supported()
    and not NATIVE.multiplies_pairs_fast
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, to a result of the same dtype, its products in float32 where those of bfloat16 are slower.

    Under autocast the input is rounded to bfloat16 as PyTorch does it; weights in float32 are multiplied as they are,
    and so is their gradient: it has one rounding less each than PyTorch's.
    """
    if not _is_widened(input, weight):
        return F.linear(input, weight, bias)
    result: Tensor = _Linear.apply(input.to(torch.bfloat16), weight, bias)  # type: ignore[no-untyped-call]
    return result


def _is_widened(input: Tensor, weight: Tensor) -> bool:
    if not BFLOAT16_IS_SLOW:
        return False
    if torch.is_autocast_enabled("cpu"):
        dtypes = (torch.float32, torch.bfloat16)
        if torch.get_autocast_dtype("cpu") != torch.bfloat16 or input.dtype not in dtypes or weight.dtype not in dtypes:
            return False
    elif not input.dtype == weight.dtype == torch.bfloat16:
        return False
    if not (input.is_cpu and weight.is_cpu and input.dim() > 1 and weight.dim() == 2):
        return False
    if not torch.compiler.is_compiling() and reasons_of_context():
        return False
    return weight.dtype == torch.float32 or input.shape[:-1].numel() >= FEWEST_ROWS


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(input.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


class _Linear(torch.autograd.Function):
    """Keeps the operands as they came: their widened copies would double what a training step keeps."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            grad = grad_output.float()
            rows = grad.flatten(0, -2)  # [M, N]
            if ctx.needs_input_grad[0]:
                grad_input = (grad @ weight.float()).to(kept.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (rows.T @ kept.float().flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias
