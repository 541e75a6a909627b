"""Where the kernels of these tests run: on the GPU if there is one, else in a process that interprets them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.messages import receive, send

WORKER = Path(__file__).with_name("interpreter_worker.py")

# Without triton there is nothing to import here; test_triton.py alone is collected, and says so.
if importlib.util.find_spec("triton") is None:
    collect_ignore = [str(path) for path in WORKER.parent.glob("test_*.py") if path.name != "test_triton.py"]


class Interpreter:
    """`trilby.kernels.gpu` in a process of its own: `interpreter.attention(...)` calls and returns as here."""

    rounds_alike = True  # whatever is compiled in: there is one code for all strides

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.faults = receive(self._process.stdout)

    def __getattr__(self, name: str):
        def call(*arguments, **options):
            send(self._process.stdin, (name, arguments, options))
            result = receive(self._process.stdout)
            if isinstance(result, Exception):
                raise result
            return result

        return call

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="session")
def interpreter():
    """The kernels under Triton's interpreter, whose bfloat16 is repaired (see test_interpreter.py)."""
    started = Interpreter()
    yield started
    started.close()


@pytest.fixture
def mutant(interpreter):
    """A function that puts one mistake into the interpreted kernels, until the test ends."""

    def mutate(module: str, old: str, new: str) -> Interpreter:
        interpreter.mutate((f"trilby.kernels.gpu.{module}", old, new))
        return interpreter

    yield mutate
    interpreter.mutate()


class Device:
    """`trilby.kernels.gpu` on this machine's GPU, called with tensors of the CPU and returning such."""

    rounds_alike = False  # other strides are other machine code, which adds in another order

    def __getattr__(self, name: str):
        from trilby.kernels import gpu

        def call(*arguments, **options):
            moved = [_moved(argument, "cuda") for argument in arguments]
            return _moved(getattr(gpu, name)(*moved, **options), "cpu")

        return call


def _moved(value, device: str):
    """Tensors on `device`, with the strides they have: `Tensor.to` would materialize an expanded one."""
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype, device=device).set_(
        value.untyped_storage().to(device=torch.device(device))
    )
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.fixture(params=["interpreter", "device"] if torch.cuda.is_available() else ["interpreter"])
def kernels(request: pytest.FixtureRequest):
    """The kernels, under the interpreter and, where there is one, on the GPU too."""
    return request.getfixturevalue("interpreter") if request.param == "interpreter" else Device()
