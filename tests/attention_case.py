"""A call of attention, its inputs, and the two who compute it: trilby's operator and PyTorch's function."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trilby.kernels.ops import NATIVE
from trilby.kernels.options import AttentionOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_extension = pytest.mark.skipif(not NATIVE.loaded, reason=f"no C++ kernels to test: {NATIVE.reason}")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; query heads H, key heads Hkv, T queries, S keys."""

    B: int
    H: int
    Hkv: int
    T: int
    S: int
    D: int
    Dv: int
    is_causal: bool = True
    scale: float | None = None

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Normal query, key and value that ask for gradients."""
        query = torch.randn(self.B, self.H, self.T, self.D).to(dtype)
        key = torch.randn(self.B, self.Hkv, self.S, self.D).to(dtype)
        value = torch.randn(self.B, self.Hkv, self.S, self.Dv).to(dtype)
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()

    @property
    def options(self) -> AttentionOptions:
        """What the operator is asked for."""
        return AttentionOptions.plain(self.is_causal, self.factor)

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return 1 / math.sqrt(self.D) if self.scale is None else self.scale


def pytorch(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """The rival: what a user would otherwise run."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=case.is_causal, scale=case.scale, enable_gqa=case.Hkv != case.H
    )


def trilby(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """The operator itself, whatever the rule that chooses between it and PyTorch's says."""
    return torch.ops.trilby.attention(query, key, value, *case.options)[0]


def gradients(output: Tensor, inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Of query, key and value."""
    return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
