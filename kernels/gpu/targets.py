"""The GPUs that the kernels are compiled for, and which of them a device is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture, and the limit that the launch tables must respect.

    Attributes:
        name: As the vendor calls it: "sm_90", "gfx942".
        backend: As Triton calls it: "cuda" or "hip".
        architecture: As Triton calls it: 90, "gfx942".
        warp_size: Threads that run in step.
        shared_memory: Bytes that one program may use.
    """

    name: str
    backend: str
    architecture: int | str
    warp_size: int
    shared_memory: int

    @property
    def has_descriptors(self) -> bool:
        """Whether it loads tiles by tensor descriptors."""
        return isinstance(self.architecture, int) and self.architecture >= 90


@dataclass(frozen=True)
class Device:
    """A target with its number of multiprocessors (AMD: compute units), which size a persistent grid."""

    target: Target
    processors: int


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

# Architectures that are not compiled for in the tests, and the one whose launch parameters suit them: the same
# matrix instructions and at least its shared memory.
NEAREST = {
    "sm_87": "sm_86",  # Orin
    "sm_103": "sm_100",  # B300
    "sm_121": "sm_120",  # GB10
    "gfx940": "gfx942",
    "gfx941": "gfx942",
    "gfx950": "gfx942",  # MI350
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
}

# The interpreter runs one program after another: the number decides only how rows are dealt to programs, and
# one makes every program loop.
INTERPRETER = Device(TARGETS["sm_90"], processors=1)

_pretended: ContextVar[Device | None] = ContextVar("_pretended", default=None)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Tensors on the meta device count as on `device`, which need not be here, to see what would be launched there."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def target_of(architecture: str) -> Target:
    """The target whose launch parameters serve `architecture` ("sm_90", "gfx942").

    Raises:
        ValueError: An architecture that the kernels are not compiled and checked for.
    """
    name = NEAREST.get(architecture, architecture)
    if name not in TARGETS:
        raise ValueError(
            f"the GPU's architecture is {architecture}; the Triton kernels serve {', '.join([*TARGETS, *NEAREST])}"
        )
    return TARGETS[name]


def device_of(tensor: torch.Tensor, argument: str) -> Device:
    """The device that `tensor` lies on, asked once for each.

    Raises:
        ValueError: `tensor`, which the message calls `argument`, is not on a GPU that the kernels serve.
    """
    if tensor.device.type == "cuda":
        index = tensor.device.index
        return _cuda_device(torch.cuda.current_device() if index is None else index)
    if tensor.device.type == "cpu" and _is_interpreted():
        return INTERPRETER
    if tensor.device.type == "meta" and (pretended := _pretended.get()) is not None:
        return pretended
    raise ValueError(
        f"{argument} is on {tensor.device}; the Triton kernels run on CUDA and ROCm devices "
        "(and on the CPU if TRITON_INTERPRET=1 was set before Triton was imported)"
    )


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Device(target_of(architecture), properties.multi_processor_count)


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
