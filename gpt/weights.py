"""How the weights of a GPT are held for generating, which waits for them: every token reads them all.

A processor reads bytes, so half as many are read in half the time. "bfloat16" keeps, and computes in, 8 bits of a
number's 24; "int8" keeps 8 bits of every weight in a matrix, with one scale a row, and computes in float32. Embeddings,
of which a token reads one row, stay as they are.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from trilby import kernels

from .layers import Layers
from .model import GPT, Linear

Weights = Literal["float32", "bfloat16", "int8"]


class QuantizedLinear(nn.Module):
    """A `Linear` whose weights are 8-bit integers; for generating where it is, not for training nor for moving."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = kernels.quantize_rows(linear.weight)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.layers = linear.layers

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return self.layers.linear(input, self.weight, self.bias)


def hold(model: GPT, weights: Weights) -> GPT:
    """Turn `model`, in float32, into one that holds its weights as `weights`, in place, and return it.

    Raises:
        ValueError: `weights` is not one of the three.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}; allowed are {', '.join(get_args(Weights))}")
    if weights == "bfloat16":
        return model.to(torch.bfloat16)
    if weights == "int8":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, QuantizedLinear(child))
    return model.requires_grad_(False)


def dense(model: GPT, layers: Layers, dtype: torch.dtype) -> GPT:
    """A copy made of `layers`, in `dtype`, with the numbers that the weights of `model` stand for, however held."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state |= {f"{name}.weight": module.weight.dequantized()}
            state |= {} if module.bias is None else {f"{name}.bias": module.bias}
    copy = GPT(model.config, layers).to(dtype).eval()
    copy.lm_head.weight = nn.Parameter(torch.empty_like(copy.lm_head.weight))  # rounded, it is no longer the embedding
    copy.load_state_dict(state)
    return copy.requires_grad_(False)
