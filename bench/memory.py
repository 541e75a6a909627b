"""How much memory a call needs beyond its inputs, as the system sees it: scratch of any library is counted.

Linux only. The process hands all free memory back, resets the kernel's high-water mark, calls, and reads the mark.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"  # Documentation/filesystems/proc.rst of Linux


def peak_bytes(call: Callable[[], object]) -> int | None:
    """The most memory resident during `call`, less what was before it; None where the system cannot tell."""
    if not _STATUS.exists():
        return None
    _trim()
    try:
        _RESET.write_text(RESET_HIGH_WATER_MARK)
    except OSError:  # a sandbox may not have it
        return None
    before = _status_bytes("VmRSS")
    call()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def _status_bytes(field: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _trim() -> None:
    """Hand freed memory back to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
