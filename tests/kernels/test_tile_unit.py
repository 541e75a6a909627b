"""Attention in bfloat16, multiplied as such: by vectors of pairs (level `avx512bf16`) and on the tile unit (`amx`).

On a machine that has one, every test of attention runs on it. On one that has no tile unit, the same tests run in a
process in which software stands behind the unit's instructions.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attention_case import Case, gradients, trilby
from trilby.kernels import doctor
from trilby.kernels.native import LIBRARY
from trilby.kernels.ops import NATIVE

HERE = Path(__file__).parent
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
BUILT = NATIVE.loaded and NATIVE.why_not_amx != "the compiler that built trilby knows no AMX"

pytestmark = pytest.mark.skipif(
    not BUILT, reason=f"no kernels for the tile unit to test: {NATIVE.reason or NATIVE.why_not_amx}"
)

READS_MACHINE_CODE = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64", reason="no objdump, or no x86 code to read"
)


@pytest.fixture(scope="module")
def tile_unit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with a tile unit in software."""
    if "amx" in NATIVE.levels:
        pytest.skip("this machine has a tile unit: every test of attention runs on it")
    if "avx512" not in NATIVE.levels or COMPILER is None:
        pytest.skip("no AVX-512, which processors with a tile unit have, or no C++ compiler to build the unit with")
    library = tmp_path_factory.mktemp("tile_unit") / "tile_unit.so"
    command = [COMPILER, "-std=c++17", "-O2", "-Wno-psabi", "-fPIC", "-shared", str(HERE / "tile_unit.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRILBY_CPU_ISA", None)
    if "CPUID does not fault" in run("", environment).stderr:
        pytest.skip("this kernel cannot make CPUID fault, so that nothing can stand in for a tile unit")
    return environment


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` where trilby finds a tile unit."""
    command = [sys.executable, "-c", f"import emulated_tiles\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_test_of_attention_passes_on_the_tile_unit(tile_unit: dict[str, str]) -> None:
    """Edges, features, layouts, random sizes, hidden NaN and infinities, every number of threads: in bfloat16."""
    files = [str(HERE / name) for name in ("test_attention.py", "test_attention_features.py", "test_tile_unit.py")]
    chosen = "amx and bfloat16 or whatever_is_combined or TestTiles"
    options = ["-q", "-x", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "emulated_tiles"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", chosen],
        env=tile_unit, cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 70, done.stdout[-500:]


def test_the_level_is_the_best_and_its_products_are_the_units(tile_unit: dict[str, str]) -> None:
    code = """
import torch
before = emulated_tiles.unit.products()
query = torch.randn(1, 1, 64, 64)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.ops.trilby.attention(*[query.to(dtype)] * 3, *[None] * 7, 0.125, False, -1, -1, 0.0, 0.0, 0)
    print(emulated_tiles.unit.products() - before)
print(emulated_tiles.NATIVE.level, *emulated_tiles.NATIVE.levels)
"""
    done = run(code, tile_unit)
    # Sᵀ: 4 tiles of keys, 4 of queries and 2 of the head dimension; Oᵀ: the same.
    assert done.stdout.split() == ["0", "0", "64", "amx", *NATIVE.levels, "amx"], done.stderr


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refused", "the kernel does not permit AMX: Operation not permitted"),
        ("wrong", "a product by AMX, computed as a check, is wrong"),
    ],
)
def test_a_tile_unit_that_cannot_be_used_gives_the_best_other_level_and_a_reason(
    trouble: str, reason: str, tile_unit: dict[str, str]
) -> None:
    code = "from trilby.kernels.doctor import report; print(report())"
    done = run(code, tile_unit | {"TILE_UNIT": trouble})
    assert f"Not amx, for attention in bfloat16: {reason}\n" in done.stdout, done.stderr
    best = "avx512bf16" if NATIVE.multiplies_pairs_fast else "avx512"
    assert f"running {best}; this machine can run {', '.join(NATIVE.levels)} (" in done.stdout


def test_another_level_by_name_never_touches_the_unit(tile_unit: dict[str, str]) -> None:
    code = "print(emulated_tiles.NATIVE.level, emulated_tiles.unit.products())"
    asked = {"TRILBY_CPU_ISA": "avx512", "TILE_UNIT": "unasked"}
    assert run(code, tile_unit | asked).stdout.split() == ["avx512", "0"]


def test_the_doctor_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("amx" in NATIVE.levels) == (NATIVE.why_not_amx == "")
    assert ("Not amx" in doctor.report()) == ("amx" not in NATIVE.levels)


@pytest.mark.skipif("avx512" not in NATIVE.levels, reason="no AVX-512, which multiplies pairs of bfloat16")
def test_vectors_of_pairs_are_the_best_where_they_are_faster() -> None:
    """An Intel processor multiplies them at half the speed of float32."""
    if NATIVE.multiplies_pairs_fast:
        assert "avx512bf16" in NATIVE.levels
    best = subprocess.run(
        [sys.executable, "-c", "from trilby.kernels.ops import NATIVE; print(NATIVE.level)"],
        env={name: value for name, value in os.environ.items() if name != "TRILBY_CPU_ISA"},
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    others = "avx512bf16" if NATIVE.multiplies_pairs_fast else "avx512"
    assert best == ("amx" if "amx" in NATIVE.levels else others)


class TestTiles:
    """What the levels that multiply bfloat16 do alone."""

    @pytest.fixture(autouse=True, params=["avx512bf16", "amx"])
    def tiled_level(self, request: pytest.FixtureRequest) -> Iterator[str]:
        if request.param not in NATIVE.levels:
            why = NATIVE.why_not_amx if request.param == "amx" else "the processor has no AVX512-BF16"
            pytest.skip(f"no level {request.param}: {why}")
        before = NATIVE.level
        NATIVE.use_level(request.param)
        yield request.param
        NATIVE.use_level(before)

    @pytest.mark.parametrize(
        ("dtype", "D", "Dv", "tiled"),
        [
            (torch.bfloat16, 8, 8, True),
            (torch.bfloat16, 256, 256, True),
            (torch.bfloat16, 7, 64, False),
            (torch.bfloat16, 64, 7, False),
            (torch.float16, 64, 64, False),
            (torch.float32, 64, 64, False),
        ],
    )
    def test_which_calls_are_multiplied_by_tiles(
        self, tiled_level: str, dtype: torch.dtype, D: int, Dv: int, tiled: bool
    ) -> None:
        """Others are avx512's, bit by bit."""
        case = Case(1, 2, 2, 70, 90, D, Dv)
        inputs = case.inputs(dtype)
        grad_output = torch.randn(1, 2, 70, Dv)
        results = {}
        for level in ("avx512", tiled_level):
            NATIVE.use_level(level)
            output = trilby(*inputs, case)
            results[level] = output, *gradients(output, inputs, grad_output)
        same = [torch.equal(a, b) for a, b in zip(*results.values())]
        assert not any(same) if tiled else all(same)

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_hidden_keys_and_values_cannot_leak(self, is_causal: bool) -> None:
        """NaN and infinities in keys and values change no bit of the queries that do not see them, nor of gradients."""
        case = Case(1, 2, 2, 150, 150, 40, 48, is_causal=is_causal)
        query, key, value = (tensor.detach() for tensor in case.inputs(torch.bfloat16))
        grad_output = torch.randn(1, 2, 150, 48)
        seen = 70 if is_causal else 0
        grad_output[:, :, seen:] = 0
        clean = query.clone().requires_grad_(), key, value
        key, value = key.clone(), value.clone()
        key[:, :, 70:73] = torch.nan
        value[:, :, 70:75, ::3] = torch.inf
        value[:, :, 149] = torch.nan
        poisoned = query.clone().requires_grad_(), key, value
        expected, output = trilby(*clean, case), trilby(*poisoned, case)
        gradient = torch.autograd.grad(output, poisoned[0], grad_output)[0]
        clean_gradient = torch.autograd.grad(expected, clean[0], grad_output)[0]
        assert torch.equal(output[:, :, :seen], expected[:, :, :seen])
        assert output[:, :, seen:].isnan().any(-1).all()
        assert torch.equal(gradient[:, :, :seen], clean_gradient[:, :, :seen])


def loops_of_products(instruction: str) -> list[list[str]]:
    """The instructions of each innermost loop of the shipped object that multiplies by this one."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(LIBRARY)]
    functions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    return [loop for code in functions if instruction in code for loop in _loops_with(instruction, code)]


def _loops_with(instruction: str, code: str) -> list[list[str]]:
    lines = [match.groups() for match in re.finditer(r"^ +([0-9a-f]+):\t(\S+) *(?:([0-9a-f]+) <)?", code, re.MULTILINE)]
    line_of = {address: line for line, (address, _, _) in enumerate(lines)}
    spans = []
    for last, (_, name, target) in enumerate(lines):
        first = line_of.get(target, last + 1)
        if name.startswith("j") and first <= last and instruction in [name for _, name, _ in lines[first : last + 1]]:
            spans.append((first, last))
    innermost = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b <= last for a, b in spans if (a, b) != (first, last))
    ]
    return [[name for _, name, _ in lines[first : last + 1]] for first, last in innermost]


@READS_MACHINE_CODE
def test_each_operand_of_a_product_is_loaded_once_and_no_tile_is_spilled() -> None:
    """In the shipped object: of R x C sums a step loads R + C tiles and multiplies R · C.

    The sums stay in tiles from step to step, or, where there is one step, come and go with it. In a product from 0 of
    one or two steps it is the right operand that stays: 16 rows load their own tiles alone. What multiplies once and
    loads nothing keeps the unit awake.
    """
    loops = loops_of_products("tdpbf16ps")
    found = {(body.count("tileloadd"), body.count("tdpbf16ps"), body.count("tilestored")) for body in loops}
    sizes = (2, 2), (1, 2), (2, 1), (1, 1)
    kept = {(R + C, R * C, 0) for R, C in sizes}
    one_step = {(R * C + R + C, R * C, R * C) for R, C in sizes}
    right_kept = {(steps, 2 * steps, 2) for steps in (1, 2)}
    assert (4, 4, 0) in found
    assert right_kept <= found
    assert found <= kept | one_step | right_kept | {(0, 1, 0)}


@READS_MACHINE_CODE
def test_the_largest_product_by_vectors_of_pairs_does_little_else() -> None:
    """Of 12 rows and 2 vectors a step loads 2, broadcasts 12 and multiplies 24: not one sum leaves its register."""
    largest = [body for body in loops_of_products("vdpbf16ps") if body.count("vdpbf16ps") == 24]
    assert largest
    for body in largest:
        others = [name for name in body if name not in ("vdpbf16ps", "vpbroadcastd")]
        assert body.count("vpbroadcastd") == 12
        assert sum(name.startswith("vmov") for name in others) == 2
        assert len(others) <= 12, others
