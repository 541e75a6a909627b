"""What GELU means, in its tanh form."""

import math

import torch
from torch import Tensor

from .dtypes import computed

CUBIC = 0.044715


def _inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + CUBIC * x**3)


def gelu(input: Tensor) -> Tensor:
    """Input · sigmoid(2u), or input/2 · (1 + tanh u), with u = √(2/π) (input + 0.044715 input³); in input's dtype."""
    x = computed(input)
    return (x * torch.sigmoid(2 * _inner(x))).to(input.dtype)


def gelu_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The gradient of input: grad_output · (s + input · s (1 - s) · 2u') with s = sigmoid(2u), in input's dtype."""
    x = computed(input)
    below, above = torch.sigmoid(2 * _inner(x)), torch.sigmoid(-2 * _inner(x))
    twice_slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * CUBIC * x**2)
    return (computed(grad_output) * (below + x * below * above * twice_slope)).to(input.dtype)
