"""Builds trilby's one optional part, the C++ extension for CPUs; everything else is in pyproject.toml.

The kernels are compiled once per instruction-set level into one shared object that picks a level when it is loaded.
It is linked against the LibTorch stable ABI alone, so one object serves every torch from 2.10 on and every Python.
Nothing here may fail an installation: without torch, a compiler or ninja, trilby installs without the extension.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
PER_LEVEL = [
    "attention_forward.cpp",
    "attention_decode.cpp",
    "attention_weights.cpp",
    "attention_backward.cpp",
    "norm_forward.cpp",
    "norm_backward.cpp",
    "linear.cpp",
    "gelu.cpp",
    "level.cpp",
]
# What the levels for bf16 gain something for; all else is avx512's there, too.
PER_BF16_LEVEL = ["attention_forward.cpp", "attention_weights.cpp", "attention_backward.cpp", "level.cpp"]
SOURCES = {"avx512bf16": PER_BF16_LEVEL, "amx": [*PER_BF16_LEVEL, "tile_check.cpp"]}
ONCE = [
    "bindings_attention.cpp",
    "bindings_norm.cpp",
    "bindings_linear.cpp",
    "bindings_gelu.cpp",
    "bindings_blocks.cpp",
    "bindings_provider.cpp",
    "bindings_encoder.cpp",
    "blocks.cpp",
    "isa.cpp",
    "scratch.cpp",
    "pages.cpp",
]
X86_V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
X86_V4 = [
    *X86_V3,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512cd",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
]
BF16 = [*X86_V4, "-mavx512bf16"]
# Without exceptions: what is to be undone would name a symbol that every level shares; scratch memory is there before.
AMX = [*BF16, "-fno-exceptions", "-mamx-tile", "-mamx-bf16"]
# Optimized no further than a third less of compiling allows: x86-64 without AVX2 has not been made for ten years.
X86_V2 = ["-march=x86-64-v2", "-O1"]
LEVELS = {
    "x86_64": {"baseline": X86_V2, "avx2": X86_V3, "avx512": X86_V4, "avx512bf16": BF16, "amx": AMX},
    "aarch64": {"baseline": []},
}
COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
# gcc 12 takes its own _mm512_undefined for a mistake, and notes that vectors have no common ABI, which nothing exports;
# clang knows no such warnings.
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option"]
# An instruction of each level that not every compiler knows, nor its assembler: gcc 11, clang 11 and binutils 2.35 know
# both. Leave to use the tile unit is asked of Linux.
NEWEST = {"avx512bf16": "vdpbf16ps %zmm0, %zmm0, %zmm0"} | ({"amx": "tilerelease"} if sys.platform == "linux" else {})
TORCH_2_10 = "0x020a000000000000"  # the oldest torch whose stable ABI has parallel_for


def knows(compiler: str, flags: list[str], instruction: str) -> bool:
    """Whether `compiler` takes `flags`, and its assembler `instruction`."""
    source = f'int main() {{ asm volatile("{instruction}"); }}'
    command = [compiler, *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def levels_of(compiler: str) -> dict[str, list[str]]:
    """The levels of this kind of machine that `compiler` can build, and the flags of each."""
    levels = LEVELS.get(platform.machine(), {"baseline": []})
    return {
        level: flags
        for level, flags in levels.items()
        if level not in SOURCES or (level in NEWEST and knows(compiler, flags, NEWEST[level]))
    }


class BuildOptionalExtension(build_ext):
    """Writes a build.ninja of every source at every level and runs it; on any failure says so and installs without."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, or explain why trilby is installed without it."""
        try:
            self.run_ninja(Path(self.get_ext_fullpath(ext.name)).absolute())
        except (ImportError, OSError, subprocess.CalledProcessError) as failure:
            print(f"\ntrilby: installing WITHOUT the C++ extension: {failure}", file=sys.stderr)
            print(
                "trilby: `python -m trilby.kernels` says what that means and how to get it.\n",
                file=sys.stderr,
            )

    def run_ninja(self, output: Path) -> None:
        """Compile and link `output`."""
        # An isolated build hides the user's torch; its headers are where the interpreter keeps its packages.
        sys.path.append(sysconfig.get_path("purelib"))
        from ninja import BIN_DIR, ninja_syntax
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = next(filter(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"]), None)
        if compiler is None:
            raise OSError("no C++ compiler: neither $CXX, c++, g++ nor clang++ is on PATH")
        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{path}" for path in include_paths()]
        with (build / "build.ninja").open("w") as file:
            ninja = ninja_syntax.Writer(file)
            ninja.rule("compile", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", f"{compiler} -shared $in $flags -o $out")
            objects = []

            def compile_source(source: str, name: str, flags: list[str]) -> None:
                objects.append(f"{name}.o")
                ninja.build(
                    objects[-1],
                    "compile",
                    str((CSRC / source).absolute()),
                    variables={"flags": " ".join(flags)},
                )

            levels = levels_of(compiler)
            built = [f"-DTRILBY_HAS_{level.upper()}" for level in SOURCES if level in levels]
            for source in ONCE:
                target = [f"-DTORCH_TARGET_VERSION={TORCH_2_10}", *includes] if source.startswith("bindings") else []
                compile_source(source, Path(source).stem, [*COMMON, *built, *target])
            for level, flags in levels.items():
                for source in SOURCES.get(level, PER_LEVEL):
                    compile_source(source, f"{level}/{Path(source).stem}", [*COMMON, *flags, f"-DTRILBY_LEVEL={level}"])
            libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
            ninja.build(str(output), "link", objects, variables={"flags": " ".join(libraries)})
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(build), *jobs], check=True)


setup(
    ext_modules=[Extension("trilby.kernels._native", [], optional=True, py_limited_api=True)],
    cmdclass={"build_ext": BuildOptionalExtension},
)
