"""A launch gives Triton what it asks for, and leaves the user's settings as they were."""

from types import SimpleNamespace

import pytest
import torch
import triton
from trilby.kernels.gpu.call import Call

CPU = torch.device("cpu")


class OneForAllThreads:
    """Triton's allocator as triton 3.4 keeps it: one for the process."""

    def __init__(self, allocator):
        self._allocator = allocator

    def set(self, allocator):
        self._allocator = allocator

    def get(self):
        return self._allocator


class OfTheContext:
    """Triton's allocator as the triton that is installed keeps it."""

    def __init__(self, allocator):
        triton.set_allocator(allocator)

    def get(self):
        kept = triton.runtime._allocation._allocator
        return kept.get() if hasattr(kept, "get") else kept


def the_users(size, alignment, stream):
    raise RuntimeError("the user's allocator was asked")


@pytest.fixture(params=[OneForAllThreads, OfTheContext])
def allocation(request, monkeypatch):
    """Where Triton's allocator is kept, and the user's in it."""
    before = OfTheContext.get(None)
    kept = request.param(the_users)
    if request.param is OneForAllThreads:
        monkeypatch.setattr(triton, "set_allocator", kept.set)
        monkeypatch.setattr(triton.runtime, "_allocation", kept)
    yield kept
    monkeypatch.undo()
    triton.set_allocator(before)


def launch_by_descriptor(launch):
    """Run a call whose kernel is `launch`."""
    kernel = {(1,): lambda **options: launch()}
    Call(kernel, (1,), {}, {}, makes_descriptors=True).run(CPU)


def test_a_launch_by_descriptor_has_memory(allocation):
    found = SimpleNamespace(memory=None)

    def launch():
        found.memory = allocation.get()(256, 128, None)

    launch_by_descriptor(launch)
    assert found.memory.nbytes == 256
    assert found.memory.device == CPU


def test_the_users_allocator_stays(allocation):
    launch_by_descriptor(lambda: None)
    assert allocation.get() is the_users


def test_the_users_allocator_stays_where_a_launch_fails(allocation):
    def launch():
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        launch_by_descriptor(launch)
    assert allocation.get() is the_users
