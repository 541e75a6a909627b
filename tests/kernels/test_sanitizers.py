"""The C++ kernels read and write nothing outside their tensors, and do nothing undefined."""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from trilby.kernels.ops import NATIVE

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
SANITIZE = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wno-psabi"]


def flags(level: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What setup.py compiles this level with."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    levels = runpy.run_path(str(ROOT / "setup.py"))["LEVELS"]
    return next(of_machine[level] for of_machine in levels.values() if level in of_machine)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the kernels with sanitizers")
@pytest.mark.parametrize("level", NATIVE.levels)
def test_attention_and_linear_stay_inside_their_tensors(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = ("attention_forward", "attention_decode", "attention_backward", "linear", "scratch")
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in kernels]
    command = [
        *(COMPILER, *SANITIZE, *flags(level, monkeypatch), f"-DTRILBY_LEVEL={level}", f"-I{ROOT / 'csrc'}"),
        *(str(Path(__file__).with_name("sanitize_attention.cpp")), *map(str, sources), "-o", str(tmp_path / "attend")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    ran = subprocess.run([tmp_path / "attend"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "200 cases\n", "")
