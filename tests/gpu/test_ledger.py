"""The compile matrix's memory: nothing is compiled twice, and whatever changes code is compiled anew."""

import dataclasses

import pytest
from trilby.kernels.gpu import __main__ as command
from trilby.kernels.gpu import pool
from trilby.kernels.gpu.compile import Compilation, scalar_dots
from trilby.kernels.gpu.ledger import Ledger, key_of
from trilby.kernels.gpu.matrix import Case, norm_cases
from trilby.kernels.gpu.targets import TARGETS

CASE = next(norm_cases(TARGETS["sm_90"]))
OUTCOME = Compilation(
    registers=32,
    spills=0,
    local_bytes=0,
    shared_bytes=0,
    matrix_instructions=0,
    scalar_dots=0,
    wide_accesses=2,
    wide_share=0.9,
    narrow_accesses=0,
    descriptor_loads=0,
    assembly="LDG",
)


@pytest.fixture
def compiled(monkeypatch):
    """The names of what a run compiles; compiling itself is not what these tests are about."""
    names = []

    def compile_call(call, target):
        names.append(call.kernel.__name__)
        return OUTCOME

    monkeypatch.setattr(pool, "compile_call", compile_call)
    monkeypatch.setattr(pool, "cases", lambda target: [dataclasses.replace(CASE, target=target)])
    return names


def test_a_repeated_run_compiles_nothing_and_says_the_same(tmp_path, compiled, capsys):
    arguments = ["matrix", "--jobs", "1", "sm_90", "--ledger", str(tmp_path / "deep" / "ledger.jsonl")]
    assert command.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    assert command.main(arguments) == 0
    again = capsys.readouterr().out.splitlines()
    assert len(compiled) == 1
    assert first[:-1] == again[:-1]
    assert (first[-1], again[-1]) == ("1 cases, 1 compiled now, 0 failed", "1 cases, 0 compiled now, 0 failed")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, compiled):
    path = tmp_path / "ledger.jsonl"
    command.main(["matrix", "--jobs", "1", "sm_80", "--ledger", str(path)])
    path.write_text(path.read_text() + '\n{"key": "torn off in the mid')
    for _ in range(2):
        command.main(["matrix", "--jobs", "1", "sm_80", "sm_90", "--ledger", str(path)])
        assert len(compiled) == 2


def test_faults_are_judged_anew_by_the_limits_of_today(tmp_path, compiled, capsys, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(pool, "compile_call", lambda call, target: dataclasses.replace(OUTCOME, spills=3))
    assert command.main(["matrix", "--jobs", "1", "sm_90", "--ledger", str(path)]) == 1
    assert "3 spills" in capsys.readouterr().out
    assert command.main(["matrix", "--jobs", "1", "sm_90", "--ledger", str(path)]) == 1
    monkeypatch.setattr(pool, "cases", lambda target: [dataclasses.replace(CASE, may_spill=True)])
    assert command.main(["matrix", "--jobs", "1", "sm_90", "--ledger", str(path)]) == 0


def test_a_refusal_of_the_compiler_is_reported_and_tried_again(tmp_path, compiled, capsys, monkeypatch):
    path = tmp_path / "ledger.jsonl"

    def refuse(call, target):
        raise RuntimeError("first\nno such instruction")

    with monkeypatch.context() as context:
        context.setattr(pool, "compile_call", refuse)
        assert command.main(["matrix", "--jobs", "1", "sm_90", "--ledger", str(path)]) == 1
    assert "RuntimeError: no such instruction" in capsys.readouterr().out
    assert command.main(["matrix", "--jobs", "1", "sm_90", "--ledger", str(path)]) == 0


@pytest.mark.slow
def test_several_processes_compile_what_one_does(tmp_path, capsys):
    said = []
    for jobs in ("1", "2"):
        ledger = tmp_path / f"{jobs}.jsonl"
        arguments = ["matrix", "sm_90", "--only", "column sum", "--jobs", jobs, "--ledger", str(ledger)]
        assert command.main(arguments) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert " 0 compiled now" not in said[0]


def test_a_key_is_of_everything_that_changes_the_code():
    call = CASE.call
    variants = [
        dataclasses.replace(call, options={**call.options, "num_warps": 8}),
        dataclasses.replace(call, arguments={**call.arguments, "WIDTH": 513}),
        dataclasses.replace(call, arguments={**call.arguments, "seed": None}),
        dataclasses.replace(call, arguments={**call.arguments, "mean": None}),
    ]
    keys = {key_of(each, CASE.target) for each in (call, *variants)} | {key_of(call, TARGETS["sm_80"])}
    assert len(keys) == len(variants) + 2
    assert key_of(call, CASE.target) in keys


def test_a_size_that_changes_no_code_changes_no_key():
    more_rows = dataclasses.replace(CASE.call, arguments={**CASE.call.arguments, "rows": 77}, grid=(77,))
    assert key_of(more_rows, CASE.target) == key_of(CASE.call, CASE.target)


def test_what_is_found_is_what_was_added_but_the_assembly(tmp_path):
    Ledger(tmp_path / "ledger.jsonl").add("key", "name", OUTCOME)
    assert Ledger(tmp_path / "ledger.jsonl").find("key") == dataclasses.replace(OUTCOME, assembly="")
    assert Ledger(tmp_path / "ledger.jsonl").find("another") is None


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("#ttg.nvidia_mma<{versionMajor = 2}>", 0),
        ("#ttg.amd_mfma<{version = 3}>", 0),
        ("#ttg.amd_wmma<{version = 1}>", 0),
        ("#ttg.blocked<{order = [1, 0]}>", 1),
    ],
)
def test_a_product_without_tensor_cores_is_counted(layout, expected):
    ttgir = f"""#out = {layout}
      %scores = tt.dot %q, %k, %c : tensor<16x64xf32, #ttg.dot_op<{{opIdx = 0, parent = #out}}>> -> tensor<16x16xf32, #out> loc(#loc1)
      %s = ttng.warp_group_dot %q, %k, %c : tensor<64x64xf16, #d> -> tensor<64x64xf32, #mma>
"""  # noqa: E501
    assert scalar_dots(ttgir) == expected


def test_a_scalar_product_is_a_fault_only_where_tensor_cores_are_due():
    scalar = dataclasses.replace(OUTCOME, matrix_instructions=4, scalar_dots=1)
    assert Case("", TARGETS["sm_90"], CASE.call, multiplies=True).faults(scalar) == [
        "1 products without matrix instructions"
    ]
    assert Case("", TARGETS["sm_90"], CASE.call).faults(scalar) == []
