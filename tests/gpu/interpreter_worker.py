"""The process in which the kernels run under Triton's interpreter: requests come in, results go out.

Triton decides at import between interpreting and compiling, so that one process cannot do both; the tests
compile, and this program, started by `conftest.py` with TRITON_INTERPRET=1, interprets.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from gpu.messages import receive, send
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# ---- What the interpreter must get right before its numbers mean anything ----


@triton.jit
def canary_dot(left: tl.tensor, right: tl.tensor, product: tl.tensor) -> None:
    """product = left @ right, 16 x 16."""
    offsets = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(product + offsets, tl.dot(tl.load(left + offsets), tl.load(right + offsets)))


@triton.jit
def canary_cast(source: tl.tensor, rounded: tl.tensor) -> None:
    """rounded = source in rounded's dtype, 256 elements."""
    offsets = tl.arange(0, 256)
    tl.store(rounded + offsets, tl.load(source + offsets).to(rounded.dtype.element_ty))


def faults() -> list[str]:
    """What this interpreter computes otherwise than a GPU does."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        left = torch.randn(16, 16, generator=generator).to(dtype)
        right = torch.randn(16, 16, generator=generator).to(dtype)
        product = torch.empty(16, 16)
        canary_dot[(1,)](left, right, product)
        if not torch.allclose(product, left.float() @ right.float(), atol=1e-4):
            found.append(f"tl.dot of {dtype}")
        source = torch.randn(256, generator=generator)
        source[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
        rounded = torch.empty(256, dtype=dtype)
        canary_cast[(1,)](source, rounded)
        if not torch.equal(rounded.nan_to_num(7), source.to(dtype).nan_to_num(7)):
            found.append(f"the cast from float32 to {dtype}")
    return found


def repair() -> None:
    """Give the interpreter a bfloat16 that multiplies as numbers and rounds to nearest even, as GPUs do."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def repaired_dot(self, a, b, d, *precision):
        return dot(self, widened(a), widened(b), d, *precision)

    def repaired_cast(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.cast_impl = repaired_cast
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(InterpreterBuilder, name, lambda self, source, dtype: self.cast_impl(source, dtype))


# ---- Kernels with one deliberate mistake ----


class MutantFinder(importlib.abc.MetaPathFinder):
    """Imports one module from a source in which one piece of text is replaced."""

    def __init__(self, folder: str, module: str, old: str, new: str) -> None:
        self.folder, self.module, self.old, self.new = folder, module, old, new

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        source = Path(importlib.machinery.PathFinder.find_spec(name, path).origin).read_text()
        if self.old not in source:
            raise ImportError(f"{self.module} has no {self.old!r} to mutate")
        mutant = Path(tempfile.mkdtemp(dir=self.folder), name.rpartition(".")[2] + ".py")
        mutant.write_text(source.replace(self.old, self.new))
        return importlib.util.spec_from_file_location(name, mutant)


def load_kernels(*finders):
    """trilby.kernels.gpu, imported anew through `finders`."""
    for name in [name for name in sys.modules if name.startswith("trilby.kernels.gpu")]:
        del sys.modules[name]
    sys.meta_path[:0] = finders
    try:
        return importlib.import_module("trilby.kernels.gpu")
    finally:
        del sys.meta_path[: len(finders)]


def serve(requests, replies, folder: str) -> None:
    """Answer until the tests end: a name calls a kernel, "mutate" puts a mistake into one, or takes it out again."""
    gpu = load_kernels()
    while True:
        try:
            name, arguments, options = receive(requests)
        except EOFError:
            return
        try:
            if name == "mutate":
                gpu = load_kernels(*(MutantFinder(folder, *mutation) for mutation in arguments))
                result = None
            else:
                result = getattr(gpu, name)(*arguments, **options)
        except Exception as error:
            result = error if type(error).__module__ == "builtins" else RuntimeError(repr(error))
        send(replies, result)


def main() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not mix with the replies
    torch.set_num_threads(1)
    before = faults()
    repair()
    send(replies, {"before": before, "after": faults()})
    with tempfile.TemporaryDirectory() as folder:
        serve(requests, replies, folder)


if __name__ == "__main__":
    main()
