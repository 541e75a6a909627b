"""`keep_memory`: freed memory stays in the process, is handed back on request, and other allocators are left alone."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest
from trilby.kernels import keep_memory, memory

GLIBC = not memory._reason_not_glibc()

PAGE_FAULTS = """
import resource, torch
from trilby.kernels import keep_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(40 * 2**20, dtype=torch.uint8).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
faults()
print(faults())
assert keep_memory().kept
faults()
faults()  # the heap has come to its size
print(faults())
held = resident()
assert not keep_memory(False).kept
print(held - resident())
"""


def _run(program: str, **variables: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    ).stdout.split()


@pytest.mark.skipif(not GLIBC, reason=memory._reason_not_glibc() or "glibc")
def test_kept_memory_takes_no_page_faults_again() -> None:
    before, kept, handed_back = map(int, _run(PAGE_FAULTS))
    assert before > 100, "a tensor above 32 MiB should be mapped anew without keep_memory"
    assert kept < before / 100
    # What is asked for later may still come from a hole between living blocks, which glibc serves before it maps.
    assert handed_back > 30 * 2**20, "the freed tensor of 40 MiB stays in the process"


@pytest.mark.skipif(not GLIBC, reason=memory._reason_not_glibc() or "glibc")
def test_state_says_what_was_asked_for() -> None:
    printed = _run(
        "from trilby.kernels import keep_memory, memory\n"
        "print(memory.memory().kept, keep_memory().kept, memory.memory().kept, keep_memory(False).kept)"
    )
    assert printed == ["False", "True", "True", "False"]


def test_another_allocator_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"gnu_get_libc_version": "/lib/libc.so.6", "malloc": "/usr/lib/libjemalloc.so.2"}
    monkeypatch.setattr(memory, "_provider", lambda _, function: other[function])
    memory._reason_not_glibc.cache_clear()
    try:
        state = keep_memory()
        assert not state.kept
        assert state.reason == "malloc is that of /usr/lib/libjemalloc.so.2, not glibc's"
        other["gnu_get_libc_version"] = ""
        memory._reason_not_glibc.cache_clear()
        assert keep_memory().reason == "the C library is not glibc"
    finally:
        memory._reason_not_glibc.cache_clear()


# What programs preload, by its name without "lib", and the Debian package that brings it.
ALLOCATORS = {"jemalloc": "libjemalloc2", "tcmalloc_minimal": "libtcmalloc-minimal4"}


@pytest.mark.skipif(not GLIBC, reason=memory._reason_not_glibc() or "glibc")
@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_preloaded_allocator_serves_tensors_and_is_left_alone(name: str) -> None:
    library = find_library(name)
    if library is None:
        pytest.skip(f"no {name} to preload: the Debian package is {ALLOCATORS[name]}")
    program = (
        "import torch\n"
        "from trilby.kernels import keep_memory\n"
        "before = keep_memory()\n"
        "torch.ones(3 * 2**20).add_(1)\n"
        "after = keep_memory(False)\n"
        "print(before.kept, after.kept, before == after)\n"
        "print(before.reason)"
    )
    kept, kept_after, same, *reason = _run(program, LD_PRELOAD=library)
    assert (kept, kept_after, same) == ("False", "False", "True")
    assert " ".join(reason).startswith("malloc is that of /")
    assert f"{name}.so" in " ".join(reason)


def test_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mallopt(self, *_: int) -> int:
            return 0

    monkeypatch.setattr(memory, "_reason_not_glibc", lambda: "")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Refusing())
    monkeypatch.setattr(memory, "_state", memory._state)
    assert keep_memory() == memory.Memory(False, "glibc refused mallopt(-4, -1)")
