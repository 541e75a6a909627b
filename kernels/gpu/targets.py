"""The GPUs that the kernels are compiled for, and which of them a device is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture, as Triton names it, and the limit that the launch tables must respect."""

    name: str
    backend: str  # "cuda" or "hip"
    architecture: int | str
    warp_size: int
    shared_memory: int  # bytes that one program may use


KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB),  # A100
        Target("sm_86", "cuda", 86, 32, 99 * KIB),  # A10, RTX 30
        Target("sm_89", "cuda", 89, 32, 99 * KIB),  # L4, L40, RTX 40
        Target("sm_90", "cuda", 90, 32, 227 * KIB),  # H100, H200
        Target("sm_100", "cuda", 100, 32, 227 * KIB),  # B200
        Target("sm_120", "cuda", 120, 32, 99 * KIB),  # RTX 50
        Target("gfx90a", "hip", "gfx90a", 64, 64 * KIB),  # MI200
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB),  # MI300
        Target("gfx1100", "hip", "gfx1100", 32, 64 * KIB),  # RX 7900
    )
}
