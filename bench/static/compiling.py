"""Compile whatever a function would launch, for a GPU that is not here.

Triton asks its driver what device there is. Here the answer is the target of one's choice, and where a kernel would be
launched it is compiled and noted instead: so the kernels of other projects are compiled as their own host code asks for
them, with their own block sizes, and every candidate of their autotuners.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from trilby.kernels.gpu.compile import Compilation, read
from trilby.kernels.gpu.targets import Device, Target, pretend
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# An H100's: it sizes persistent grids, and changes no code.
PROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    """A kernel that would have been launched.

    Attributes:
        kernel: Its name.
        identity: Different for different machine code.
        programs: How many it would have been launched with.
        warps: Of a program.
        constants: What it was compiled for, by name.
        target: For which GPU.
        compiled: What Triton made of it.
    """

    kernel: str
    identity: str
    programs: int
    warps: int
    constants: dict[str, Any]
    target: Target
    compiled: Any

    @cached_property
    def compilation(self) -> Compilation:
        """What became of it, in numbers; reading the machine code takes a second."""
        return read(self.compiled, self.target)

    @property
    def ttir(self) -> str:
        """The kernel in Triton's own dialect, whose loads and stores still have tensors' types."""
        text: str = self.compiled.asm["ttir"]
        return text


class AbsentDevice:
    """What Triton's driver would say if `target` were here."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """The target."""
        return GPUTarget(self._target.backend, self._target.architecture, self._target.warp_size)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device: one for every target."""
        return hash(self._target.name)

    def get_current_stream(self, device: int) -> int:
        """None is ever used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are made."""
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Autotuners time every candidate: here each is compiled."""

        def compile_one(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return compile_one


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Launch]]:
    """As if `target` were here, its tensors on the meta device; the list fills with what would have been launched.

    Each kernel is noted once, as often as it is launched with the same code; of candidates that differ only in how far
    ahead they load (`num_stages`), which changes no loop, the one that needs the least memory is.
    """
    launches: list[Launch] = []
    launch, prune = JITFunction.run, Autotuner.prune_configs

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        options.setdefault("enable_fp_fusion", True)  # the default, which triton 3.9 warns of
        compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
        if compiled is not None:
            named = {**dict(zip(self.arg_names, arguments)), **options}
            constants = {one.name: named[one.name] for one in self.params if one.is_constexpr and one.name in named}
            programs = math.prod(grid(named) if callable(grid) else grid)
            warps = compiled.metadata.num_warps
            found = Launch(self.__name__, compiled.hash, programs, warps, constants, target, compiled)
            if all(found.identity != other.identity for other in launches):
                launches.append(found)
        return compiled

    def unlike(self: Any, options: dict[str, Any]) -> list[Any]:
        candidates: dict[tuple[str, int], Any] = {}
        for one in sorted(prune(self, options), key=lambda one: one.num_stages):
            candidates.setdefault((str(one.kwargs), one.num_warps), one)
        return list(candidates.values())

    before = driver._active
    driver.set_active(AbsentDevice(target))
    try:
        with (
            pretend(Device(target, PROCESSORS)),
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(Autotuner, "prune_configs", unlike),
            _asked_before_a_launch(target),
        ):
            yield launches
    finally:
        driver.set_active(before)


def _asked_before_a_launch(target: Target) -> ExitStack:
    """Answers to what host code asks PyTorch of a GPU."""
    number = target.architecture if isinstance(target.architecture, int) else 0
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, warp_size=target.warp_size)
    answers = {
        "current_device": 0,
        "device": nullcontext(),
        "get_device_capability": divmod(number, 10),
        "get_device_properties": properties,
    }
    stack = ExitStack()
    stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True, create=True))
    for question, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, question, return_value=answer))
    return stack
