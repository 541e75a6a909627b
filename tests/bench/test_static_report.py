"""The static report from the compiler to the table; a public kernel is a small one that these tests write."""

import importlib.util
import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="there is nothing to compile without triton")

from trilby.bench.static import __main__ as command
from trilby.bench.static.compiling import compiling_for
from trilby.bench.static.findings import examine
from trilby.bench.static.subjects import (
    OURS,
    OURS_BY_DESCRIPTOR,
    PRODUCTS,
    TUTORIAL,
    Places,
    attention_subjects,
    norm_subjects,
)
from trilby.bench.static.table import attention_table, norm_table, to_json, verdicts
from trilby.kernels.gpu.targets import TARGETS
from triton.runtime.driver import driver

SM_90 = TARGETS["sm_90"]

# What Triton's tutorial is to the report: it asks for the device when imported, and tunes itself.
TUTORIAL_LIKE = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
DEVICE = triton.runtime.driver.active.get_active_torch_device()
assert triton.runtime.driver.active.get_current_target().arch == 90 and torch.cuda.get_device_capability()[0] == 9

def fit(nargs):
    nargs["desc"].block_shape = [nargs["BLOCK_N"], 64]

@triton.autotune([triton.Config({"BLOCK_M": 64, "BLOCK_N": n}, num_stages=s, num_warps=4, pre_hook=fit)
                  for n in (32, 64) for s in (2, 3)], key=["N_CTX"])
@triton.jit
def _attn_fwd(desc, out, N_CTX, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    q = desc.load([0, 0])
    acc = tl.zeros([BLOCK_N, 64], tl.float32)
    for start in range(0, N_CTX, BLOCK_N):
        k = desc.load([start, 0])
        acc = tl.dot(tl.exp2(tl.dot(q, k.T)).to(tl.float16), k, acc)
    rows = tl.arange(0, BLOCK_N)[:, None]
    tl.store(out + rows * 64 + tl.arange(0, 64)[None, :], acc)

class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, sm_scale):
        flat = q.detach().reshape(-1, 64)
        desc = TensorDescriptor(flat, shape=list(flat.shape), strides=[64, 1], block_shape=[1, 1])
        _attn_fwd[lambda meta: (2,)](desc, flat.float(), flat.shape[0])
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad, None, None

attention = _attention.apply
"""


@pytest.fixture
def tutorial(tmp_path):
    path = tmp_path / "tutorial.py"
    path.write_text(TUTORIAL_LIKE)
    return path


@pytest.mark.slow
def test_ours_is_compiled_as_its_host_code_asks_and_multiplies_whole_tiles():
    forward, backward, by_descriptor = examine(attention_subjects(64, Places()), SM_90)
    assert [one.subject.project for one in (forward, backward, by_descriptor)] == [OURS, OURS, OURS_BY_DESCRIPTOR]
    for finding in (forward, backward, by_descriptor):
        assert not finding.failure
        for kernel in finding.kernels:
            assert kernel.launch.compilation.spills == 0
            assert 0 < kernel.resident_warps <= kernel.most_warps
            assert PRODUCTS[kernel.launch.kernel]
            for loop in kernel.loops:
                tile = kernel.launch.constants["BLOCK_M"] * kernel.launch.constants["BLOCK_N"]
                assert loop.scores % tile == 0
                assert loop.per_score["special"] >= 1  # an exponential each
                assert 0.2 < loop.bound.tensor_use_in_turns < loop.bound.tensor_use <= 1
    assert forward.beside_tensor < backward.beside_tensor
    assert_both_choices_are_shown_and_one_is_compared(forward, by_descriptor)


def assert_both_choices_are_shown_and_one_is_compared(forward, by_descriptor):
    loads = [one.kernels[0].launch.compilation.descriptor_loads > 0 for one in (forward, by_descriptor)]
    assert loads == [False, True]
    assert attention_table([forward, by_descriptor]).row_count == 3  # a heading and a line each
    assert verdicts([forward, by_descriptor]) == []
    rival = replace(by_descriptor, subject=replace(by_descriptor.subject, project=TUTORIAL))
    (line,) = verdicts([forward, by_descriptor, rival])
    assert TUTORIAL in line


@pytest.mark.parametrize(("head_dim", "targets"), [(64, {"sm_90", "sm_100", "sm_120"}), (128, {"sm_90", "sm_100"})])
def test_the_forwards_other_choice_is_shown_where_a_target_has_it(head_dim, targets):
    other = [one for one in attention_subjects(head_dim, Places()) if one.project == OURS_BY_DESCRIPTOR]
    assert {target for one in other for target in one.targets} == targets
    assert list(examine(other, TARGETS["sm_80"])) == []


@pytest.mark.slow
def test_a_public_file_is_compiled_with_every_candidate_of_its_autotuner(tutorial):
    found = [one for one in examine(attention_subjects(64, Places(tutorial)), SM_90) if one.subject.project == TUTORIAL]
    assert [one.candidates for one in found] == [2, 0]  # stages change no loop; it has no backward kernel
    assert "launched none of _attn_bwd" in found[1].failure
    (kernel,) = found[0].kernels
    (loop,) = kernel.loops
    assert loop.scores == kernel.launch.constants["BLOCK_N"] * 64


@pytest.mark.slow
def test_a_norm_needs_one_kernel_for_all_numbers_of_rows_and_moves_what_the_mathematics_needs():
    subjects = [one for one in norm_subjects(1024) if one.project == OURS]
    found = {one.subject.operation: one for one in examine(subjects, SM_90)}
    assert {one.variants for one in found.values()} == {1}
    bfloat16, row = 2, 1024
    for operation, tensors, statistics in (
        ("layer norm forward N 1024", 2, 8),
        ("RMS norm forward N 1024", 2, 4),
        ("add + layer norm forward N 1024", 4, 8),
        ("layer norm backward N 1024", 3, 8),
        ("add + RMS norm backward N 1024", 4, 4),
    ):
        (kernel,) = found[operation].kernels
        assert kernel.traffic.per_row == tensors * row * bfloat16 + statistics, operation
    assert norm_table(list(found.values())).row_count == 2 * len(found)  # a heading and a line each


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ours_moves_fewer_bytes_than_ligers_and_needs_fewer_kernels():
    found = list(examine(norm_subjects(1024), SM_90))
    by = {(one.subject.project, one.subject.operation): one for one in found}
    for (project, operation), liger in by.items():
        if project == "Liger":
            assert by[OURS, operation].bytes_moved() < liger.bytes_moved()
        if project == "Liger" and "layer norm backward" in operation:
            assert by[OURS, operation].variants < liger.variants
    assert verdicts(found)


def test_after_compiling_everything_is_as_before():
    import torch

    before = driver._active, torch.cuda.current_device, torch.empty(1).is_cuda
    with pytest.raises(RuntimeError, match="on purpose"), compiling_for(SM_90):
        raise RuntimeError("on purpose")
    assert (driver._active, torch.cuda.current_device, torch.empty(1).is_cuda) == before


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        command.main(["sm_90", "--tutorial", str(tmp_path / "no-such-file.py")])


def test_a_missing_disassembler_is_named(monkeypatch):
    class Without:
        @property
        def cuobjdump(self):
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(command.knobs, "nvidia", Without())
    assert "cuobjdump" in command.missing_tool()
    with pytest.raises(SystemExit, match="which triton's wheels carry, is missing"):
        command.main([])


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "WIDTHS", (1024,))
    path = tmp_path / "deep" / "static.json"
    assert command.main(["sm_80", "--only", "norm", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {one["target"] for one in written} == {"sm_80"}
    assert all(one["kernels"][0]["registers"] > 0 for one in written if not one["failure"])
    assert "layer norm forward N 1024" in capsys.readouterr().out
    assert to_json([]) == []
