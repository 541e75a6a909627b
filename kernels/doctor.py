"""`python -m trilby.kernels`: what serves each operator on this machine, and for what does not, why and what to do."""

import importlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import torch

from .native import REBUILD
from .ops import NATIVE, OPERATORS, reasons_against_gpu
from .wide_product import BFLOAT16_IS_SLOW


@dataclass(frozen=True)
class Service:
    """Who computes one operator on one kind of device.

    Attributes:
        operator: Its name.
        device: "cpu" or "cuda".
        served_by: What runs, in words.
        reason: Why that is not trilby's own kernel; empty where it is.
        remedy: What would change that; empty where nothing can or need be done.
    """

    operator: str
    device: str
    served_by: str
    reason: str = ""
    remedy: str = ""


def _has_kernel(operator: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"trilby::{operator}", dispatch_key)


def _on_cpu(operator: str) -> Service:
    if _has_kernel(operator, "CPU"):
        return Service(operator, "cpu", f"C++ ({NATIVE.level})")
    if NATIVE.loaded:
        return Service(operator, "cpu", "PyTorch", "trilby has no C++ kernel for it yet")
    return Service(operator, "cpu", "PyTorch", NATIVE.reason, REBUILD)


def _on_cuda(operator: str) -> Service:
    try:
        gpu = importlib.import_module(f"{__package__}.gpu")
    except ModuleNotFoundError as missing:
        return Service(operator, "cuda", "PyTorch", f"{missing.name} is not installed", f"pip install {missing.name}")
    if not hasattr(gpu, operator):
        return Service(operator, "cuda", "PyTorch", "trilby has no Triton kernel for it yet")
    if not torch.cuda.is_available():
        return Service(operator, "cuda", "Triton, once there is a GPU", "torch sees no GPU on this machine")
    for reason in reasons_against_gpu(torch.device("cuda", torch.cuda.current_device())):
        return Service(operator, "cuda", "PyTorch", reason)
    return Service(operator, "cuda", f"Triton ({torch.cuda.get_device_name()})")


def services() -> list[Service]:
    """Every operator on every kind of device."""
    return [serve(operator.name) for serve in (_on_cpu, _on_cuda) for operator in OPERATORS]


def _lines() -> Iterator[str]:
    found = services()
    yield (
        f"trilby {version('trilby')} · torch {torch.__version__} · {platform.system()} {platform.machine()} · "
        f"{torch.get_num_threads()} threads"
    )
    if NATIVE.loaded:
        yield f"C++ extension: running {NATIVE.level}; this machine can run {', '.join(NATIVE.levels)} (TRILBY_CPU_ISA)"
        if NATIVE.why_not_amx:
            yield f"Not amx, for attention in bfloat16: {NATIVE.why_not_amx}"
    else:
        yield f"C++ extension: none, {NATIVE.reason}"
    if BFLOAT16_IS_SLOW:
        yield "Many rows of bfloat16 in trilby's linear: multiplied in float32, which this processor does faster"
    yield ""
    name_width = max(len(service.operator) for service in found)
    server_width = max(len(service.served_by) for service in found)
    yield f"{'operator':{name_width}}  {'device':6}  {'served by':{server_width}}  why"
    for service in found:
        row = (
            f"{service.operator:{name_width}}  {service.device:6}  {service.served_by:{server_width}}  {service.reason}"
        )
        yield row.rstrip()
    remedies = sorted({service.remedy for service in found if service.remedy})
    if remedies:
        yield ""
        yield from (f"To get more: {remedy}" for remedy in remedies)


def report() -> str:
    """The doctor's report, as text."""
    return "\n".join(_lines())
