"""Where dropout's seeds come from."""

import torch
from torch import Tensor


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """[1] int64 on `device` from torch's generator, so that `torch.manual_seed` decides it; none without dropout.

    Raises:
        ValueError: dropout_p is not a probability.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p was {dropout_p}; it is a probability, from 0 to 1")
    return torch.randint(2**63 - 1, (1,), device=device) if dropout_p else None
