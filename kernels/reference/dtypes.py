"""The dtype that the reference computes with."""

import torch
from torch import Tensor


def computed(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that is computed with: float32 for half precision, its own for others."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
