"""Lets a CPU program keep the memory that its tensors free.

torch takes CPU tensors from the C library's malloc. glibc's maps every block above 32 MiB anew and unmaps it when it is
freed, and hands back the top of its heap, so that the system must fault in and zero every page of every large tensor
again. That, not arithmetic, bounds large layers: measured on 2 cores with fp32 (8192, 1600), PyTorch's layer_norm
takes 24.8 ms, and 7.2 ms once freed memory is kept.
"""

import ctypes
import functools
from dataclasses import dataclass

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER_TRIM, _NEVER_MAP = -1, 0
# To restore: the default number of mapped blocks, and the thresholds that glibc comes to by itself once a program has
# freed a block of 32 MiB (mallopt(3), "dynamic mmap threshold"); what they were before cannot be asked.
_DEFAULT_MMAP_MAX, _LARGEST_MMAP_THRESHOLD = 65536, 32 << 20


@dataclass(frozen=True)
class Memory:
    """What became of a wish to keep freed memory.

    Attributes:
        kept: Whether the allocator keeps it.
        reason: Why it does not; empty if it does.
    """

    kept: bool
    reason: str = ""


_state = Memory(False, "keep_memory() was not called")


class _SharedObject(ctypes.Structure):
    """dladdr(3)'s Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _provider(library: ctypes.CDLL, function: str) -> str:
    """The shared object whose `function` this process calls; empty if none does."""
    try:
        address = ctypes.cast(getattr(library, function), ctypes.c_void_p)
        found = _SharedObject()
        library.dladdr(address, ctypes.byref(found))
    except AttributeError:
        return ""
    return (found.file or b"").decode()


@functools.cache
def _reason_not_glibc() -> str:
    """Why mallopt has no say in where tensors come from; empty if it does."""
    try:
        process = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no handle for the whole process
        return "the C library is not glibc"
    glibc, malloc = _provider(process, "gnu_get_libc_version"), _provider(process, "malloc")
    if not glibc:
        return "the C library is not glibc"
    return "" if malloc == glibc else f"malloc is that of {malloc}, not glibc's"


def memory() -> Memory:
    """Whether freed memory is kept now, and if not, why."""
    reason = _reason_not_glibc()
    return Memory(False, reason) if reason else _state


def keep_memory(keep: bool = True) -> Memory:
    """Have the C allocator keep freed memory for the next tensor instead of handing it back to the system.

    It holds for the whole process, from now on, and makes every CPU program with tensors above 32 MiB faster, trilby or
    not. The price: the process keeps the memory of its largest moment. Memory kept for one size serves another, but a
    gap between living tensors serves only what fits into it, so peak memory can rise.

    It calls glibc's mallopt: blocks come from the heap and are never mapped, and the heap is never trimmed. Threads
    other than the main one have smaller heaps of their own; blocks above 64 MiB that they ask for are mapped as ever.
    Where malloc is not glibc's (jemalloc, tcmalloc, musl, macOS, Windows) nothing is changed.

    Args:
        keep: False restores glibc's behavior and hands back what is free.

    Returns:
        Whether memory is kept, and if not, the reason.
    """
    global _state
    if _reason_not_glibc():
        return memory()
    process = ctypes.CDLL(None)
    settings = {_M_MMAP_MAX: _DEFAULT_MMAP_MAX, _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD}
    settings[_M_TRIM_THRESHOLD] = 2 * _LARGEST_MMAP_THRESHOLD
    if keep:
        settings = {_M_MMAP_MAX: _NEVER_MAP, _M_TRIM_THRESHOLD: _NEVER_TRIM}
    refused = [setting for setting, value in settings.items() if process.mallopt(setting, value) != 1]
    if not keep:
        process.malloc_trim(0)
    if refused:
        _state = Memory(False, f"glibc refused mallopt{tuple(refused)}")
    else:
        _state = Memory(keep, "" if keep else "keep_memory(False) was called")
    return _state
