"""What a training step computes, and the most that this machine computes in its time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from trilby import kernels

from .config import GPTConfig, Precision, parameter_count

SIDE = 1024  # of the square matrices whose product is timed: past every cache, and a tenth of a second at the slowest
SECONDS = 0.1


@dataclass(frozen=True)
class Ceiling:
    """The work of a token, and the most floating-point operations that were seen in a second."""

    flops_per_token: float
    rate: float

    def share(self, tokens: int, seconds: float) -> float:
        """How much of what the machine can do was done by training on `tokens` in `seconds`: 0 to 1."""
        return self.flops_per_token * tokens / seconds / self.rate


def measure_ceiling(config: GPTConfig, precision: Precision, device: torch.device) -> Ceiling:
    """Time products of large matrices, in what the training computes in: float32's, too, since widening is free.

    Where bfloat16 is slow the training multiplies in float32, and one product of bfloat16 would take seconds.
    """
    dtypes = {torch.float32}
    if precision == "bfloat16" and not (device.type == "cpu" and kernels.BFLOAT16_IS_SLOW):
        dtypes.add(torch.bfloat16)
    return Ceiling(training_flops(config, 1) / config.block_size, max(_product_rate(dtype, device) for dtype in dtypes))


def training_flops(config: GPTConfig, batch_size: int) -> float:
    """Floating-point operations of one step: 6 per parameter that multiplies, and token; and causal attention's.

    The position embedding multiplies nothing; the token embedding does, as the decoder. Attention has two products of
    T·T·C forward, half of them behind the mask, and five backward, which computes the scores again.
    """
    T, C = config.block_size, config.n_embd
    multiplying = parameter_count(config) - T * C
    attention = (2 + 5) * 2 * T * T * C / 2
    return batch_size * (6 * multiplying * T + config.n_layer * attention)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    left = torch.randn(SIDE, SIDE, device=device).to(dtype)
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < SECONDS or fastest == float("inf"):
        begun = time.perf_counter()
        (left @ left)[0, 0].item()  # which waits for a GPU
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * SIDE**3 / fastest
