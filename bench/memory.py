"""How much memory a call needs beyond its inputs, as the system sees it: scratch of any library is counted.

Linux only. The process hands all free memory back, resets the kernel's high-water mark, calls, and reads the mark.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"  # Documentation/filesystems/proc.rst of Linux

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """What `call` returns, and the most memory resident while it ran, less what was before it.

    None where the system cannot tell.
    """
    before = begin_peak()
    result = call()
    return result, end_peak(before)


def begin_peak() -> int | None:
    """Begin to look for the most memory resident; what is resident now. None where the system cannot tell."""
    _trim()
    return _status_bytes("VmRSS") if _reset_high_water_mark() else None


def end_peak(before: int | None) -> int | None:
    """The most memory resident since the last `begin_peak`, less `before`, what one returned."""
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def device_peak_bytes(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """The same of a GPU's memory, which PyTorch's allocator counts."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _reset_high_water_mark() -> bool:
    try:
        _RESET.write_text(RESET_HIGH_WATER_MARK)
    except OSError:  # not Linux, or a sandbox that forbids it
        return False
    return True


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _trim() -> None:
    """Hand freed memory back to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
