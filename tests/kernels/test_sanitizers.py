"""The C++ kernels read and write nothing outside their tensors, and do nothing undefined."""

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from trilby.kernels.ops import NATIVE

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
SANITIZE = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wno-psabi"]


KERNELS = ("attention_forward", "attention_decode", "attention_weights", "attention_backward", "linear")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py says: the flags of every level, and what the levels for bf16 have of their own."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the kernels with sanitizers")
@pytest.mark.parametrize("level", NATIVE.levels)
def test_attention_and_linear_stay_inside_their_tensors(level: str, tmp_path: Path, setup: dict[str, Any]) -> None:
    flags = next(of_machine for of_machine in setup["LEVELS"].values() if level in of_machine)
    objects = []

    def compile_at(its_level: str, source: Path) -> None:
        objects.append(str(tmp_path / f"{its_level}_{source.stem}.o"))
        command = [str(COMPILER), *SANITIZE, *flags[its_level], f"-DTRILBY_LEVEL={its_level}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True, capture_output=True)

    sources = setup["SOURCES"]
    levels = ("avx512", level) if level in sources else (level,)  # what is not its own is avx512's
    for its_level in levels:
        for name in KERNELS:
            if f"{name}.cpp" in sources.get(its_level, setup["PER_LEVEL"]):
                compile_at(its_level, ROOT / "csrc" / f"{name}.cpp")
    compile_at(levels[0], ROOT / "csrc" / "scratch.cpp")
    compile_at(level, Path(__file__).with_name("sanitize_attention.cpp"))
    program = str(tmp_path / "attend")
    subprocess.run([str(COMPILER), *SANITIZE, *objects, "-o", program], check=True, capture_output=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "200 cases\n", "")
