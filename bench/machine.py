"""What this machine is, and what it can do at best: the ceilings that every share in the table is a share of.

A ceiling here is practical: the most that a plain program was seen to reach in this run, not a data sheet's number.
Multiply-adds are `torch.mm`'s at the sizes where it peaks; bandwidth is the better of PyTorch's copy and the C
library's, which, unlike PyTorch's, writes around the cache when a copy is large. What only reads is held against
`torch.dot` of two halves.
"""

import ctypes
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from trilby.kernels.doctor import services

from .cases import Device
from .measure import HOST, DeviceTimer, Timer

MIB = 2**20
# Side lengths of the products tried: small ones live in the caches, large ones hide the start of the threads.
PRODUCT_SIDES = (512, 1024, 2048, 3072)
GPU_PRODUCT_SIDES = (4096, 8192, 12288)
# A product so many times slower than the best is no ceiling at any size. On AVX2, PyTorch's product of two bfloat16
# matrices takes 130 times as long as float32's: the largest took 45 s, and four sizes 14 minutes.
HOPELESS = 4
# Bytes moved by the copies tried, read and written together: within a core's own caches, within the shared one, beyond.
COPY_BYTES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
# Bytes read: the keys and values of the case that decodes, in bfloat16 and in float32.
READ_BYTES = (192 * MIB, 384 * MIB)


@dataclass(frozen=True)
class Machine:
    """Where a run took place.

    Attributes:
        processor: Its name, as it tells it.
        cores: Processors that this process may run on.
        threads: Threads that PyTorch computes with.
        memory_bytes: Of the whole machine; 0 if it does not tell.
        cache_bytes: Of the largest cache, which a virtual machine may share with others; 0 if it does not tell.
        system: Operating system and architecture.
        load: Processes that wanted to run, over the last minute, before this run began; 0 on an idle machine.
        capability: The instruction set that PyTorch's own kernels use.
        services: What computes each of trilby's operators, by name.
        versions: Of Python, torch and trilby.
        gpu: Name, multiprocessors, memory and architecture of the GPU that the cases run on; "" where they do not.
    """

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    cache_bytes: int
    system: str
    load: float
    capability: str
    services: dict[str, str]
    versions: dict[str, str]
    gpu: str = ""


@dataclass(frozen=True)
class Copy:
    """How fast `moved` bytes, read and written together, are copied: bytes per second."""

    moved: int
    rate: float


@dataclass(frozen=True)
class Read:
    """How fast `moved` bytes are read, and nothing is written: bytes per second."""

    moved: int
    rate: float


@dataclass(frozen=True)
class Ceilings:
    """The most that was seen on this machine: floating-point operations per second by dtype, bytes by size."""

    flops: dict[str, float]
    copies: tuple[Copy, ...]
    reads: tuple[Read, ...] = ()

    def bandwidth(self, moved: int) -> float:
        """Bytes per second that nothing which moves `moved` bytes should exceed.

        The best of all copies from the next smaller size on: caches serve a smaller copy at least as well, so a share
        of this is never flattered.
        """
        ordered = sorted(self.copies, key=lambda copy: copy.moved)
        smaller = [copy for copy in ordered if copy.moved <= moved]
        return max(copy.rate for copy in ordered[max(len(smaller) - 1, 0) :])

    @property
    def reading(self) -> float:
        """Bytes per second that nothing which reads more than caches hold should exceed: the best of all reads.

        On a shared machine a read was seen to take 2.5 times as long from one second to the next: of one size alone, a
        share could be above 1.
        """
        return max(read.rate for read in self.reads)


def describe_machine(device: Device = "cpu") -> Machine:
    """What this machine says about itself, and about its GPU if cases run on `device` "cuda"."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=_system_configuration("SC_PAGE_SIZE") * _system_configuration("SC_PHYS_PAGES"),
        cache_bytes=max(_system_configuration(f"SC_LEVEL{level}_CACHE_SIZE") for level in (2, 3)),
        system=f"{platform.system()} {platform.machine()}",
        load=os.getloadavg()[0],
        capability=torch.backends.cpu.get_cpu_capability(),
        services={service.operator: service.served_by for service in services() if service.device == device},
        versions={"python": platform.python_version(), "torch": torch.__version__, "trilby": version("trilby")},
        gpu=_gpu() if device == "cuda" else "",
    )


def measure_ceilings(quick: bool, advance: Callable[[], None], device: Device = "cpu") -> Ceilings:
    """Measure the ceilings with the threads that PyTorch has; `advance` is called `ceiling_steps(quick)` times."""
    sides = (PRODUCT_SIDES if device == "cpu" else GPU_PRODUCT_SIDES)[: 2 if quick else None]
    sizes = COPY_BYTES[:4] if quick else COPY_BYTES
    flops: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        # bfloat16's ceiling is never below float32's: widening is free to all, and pays where products of bfloat16
        # have no instruction or no good library.
        rates = [*flops.values()]
        for side in sides:
            if not is_hopeless(rates):
                rates.append(product_rate(side, dtype, device))
            advance()
        flops[str(dtype).removeprefix("torch.")] = max(rates)
    copies = []
    for size in sizes:
        copies.append(Copy(size, copy_rate(size, device)))
        advance()
    reads = []
    for size in _read_sizes(quick, device):
        reads.append(Read(size, read_rate(size)))
        advance()
    return Ceilings(flops, tuple(copies), tuple(reads))


def is_hopeless(rates: Sequence[float]) -> bool:
    """Whether the last of `rates` is so far below another that larger products are not worth waiting for."""
    return bool(rates) and HOPELESS * rates[-1] < max(rates)


def _read_sizes(quick: bool, device: Device) -> tuple[int, ...]:
    """What `read_rate` is measured at: on a GPU no case is held against it."""
    return () if device == "cuda" else READ_BYTES[: 1 if quick else None]


def ceiling_steps(quick: bool, device: Device = "cpu") -> int:
    """How many measurements `measure_ceilings` makes."""
    sides = PRODUCT_SIDES if device == "cpu" else GPU_PRODUCT_SIDES
    return (2 * 2 + 4 if quick else 2 * len(sides) + len(COPY_BYTES)) + len(_read_sizes(quick, device))


def product_rate(side: int, dtype: torch.dtype, device: Device = "cpu") -> float:
    """Operations per second, a multiplication and an addition counted as two, of a product of two square matrices."""
    left, right = torch.randn(side, side).to(device, dtype), torch.randn(side, side).to(device, dtype)
    product = torch.empty(side, side, dtype=dtype, device=device)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    return 2 * side**3 / _fastest(multiply, seconds=0.4, timer=timer_of(device))


def copy_rate(moved: int, device: Device = "cpu") -> float:
    """Bytes per second of copying `moved` / 2 bytes, reads and writes counted."""
    source, target = (torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    if device == "cuda":
        return moved / _fastest(lambda: target.copy_(source), seconds=0.2, timer=timer_of(device))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        c_library = _fastest(lambda: _copy_by_c_library(target, source, pool, threads), seconds=0.2)
    return moved / min(c_library, _fastest(lambda: target.copy_(source), seconds=0.2))


def read_rate(moved: int) -> float:
    """Bytes per second of reading `moved` bytes from memory.

    By `torch.dot` of their halves, which reads the fastest of all tried: 1.2 times as fast as a sum, and 1.4 times as a
    product of 8 or 16 long rows with a vector, medians of 26 turns on two threads.
    """
    left, right = torch.ones(2, moved // 2 // torch.float32.itemsize).unbind()
    return moved / _fastest(lambda: torch.dot(left, right), seconds=0.4)


def _copy_by_c_library(target: Tensor, source: Tensor, pool: ThreadPoolExecutor, threads: int) -> None:
    total = source.numel()
    borders = [total * part // threads for part in range(threads + 1)]
    wait(
        [
            # ctypes lets go of Python's lock for the call, so the parts are copied at the same time.
            pool.submit(ctypes.memmove, target.data_ptr() + start, source.data_ptr() + start, end - start)
            for start, end in itertools.pairwise(borders)
        ]
    )


def timer_of(device: Device) -> Timer:
    """What times calls on `device`."""
    return HOST if device == "cpu" else DeviceTimer(lambda: torch.cuda.Event(enable_timing=True))


def _fastest(call: Callable[[], object], seconds: float, timer: Timer = HOST) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, at least three, after one to warm up.

    A ceiling is the one place where the best run is the right one: whatever disturbs a run only lowers it.
    """
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < seconds:
        times.append(timer.time(call)())
    return min(times)


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    architecture = (
        getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    )
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, {architecture}, {toolkit}"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _system_configuration(name: str) -> int:
    """What `os.sysconf` answers, 0 where it does not know."""
    try:
        return max(os.sysconf(name), 0)
    except (ValueError, OSError):
        return 0


def command_line(arguments: Sequence[str]) -> str:
    """The command that this process is."""
    return " ".join([Path(sys.executable).name, "-m", "trilby.bench", *arguments])
