"""What the compilers make of every kernel, for GPUs that are not here: no spills, tensor cores, 16-byte accesses."""

import re
from dataclasses import replace

import pytest
import torch
from trilby.kernels.gpu.attention_forward import by_descriptor, key_addresses
from trilby.kernels.gpu.attention_launch_forward import FORWARD_BY_DESCRIPTOR
from trilby.kernels.gpu.attention_tiles import AttentionTiles
from trilby.kernels.gpu.call import addresses
from trilby.kernels.gpu.compile import compile_call
from trilby.kernels.gpu.matrix import AttentionShape, attention_cases, cases, norm_cases
from trilby.kernels.gpu.targets import TARGETS, Target

SM_90 = TARGETS["sm_90"]


def chosen(target, *patterns):
    """The cases of a target whose names match, and the names of patterns that match none."""
    found = [case for case in cases(target) if any(re.search(pattern, case.name) for pattern in patterns)]
    assert len(found) >= len(patterns)
    return found


@pytest.mark.parametrize(
    "case",
    chosen(
        SM_90,
        "attention forward bfloat16 D 64 causal 128x128",
        "attention forward bfloat16 D 128 causal 128x128",
        "attention key_value bfloat16 D 64 causal 64x64",
        "attention query bfloat16 D 128 causal 128x64",
        "attention rows",
        "norm forward bfloat16 N 1024",
        "norm backward bfloat16 N 1024",
    ),
    ids=lambda case: case.name,
)
def test_hopper(case):
    assert case.faults(compile_call(case.call, case.target)) == []


def test_hopper_multiplies_with_warpgroup_instructions():
    shape = AttentionShape(torch.bfloat16, 64, is_causal=False)  # nothing is hidden, and nothing guarded
    compilation = compile_call(shape.forward(AttentionTiles(128, 128, 8, 2)), SM_90)
    assert "HGMMA" in compilation.assembly
    assert compilation.narrow_accesses == 1  # logsumexp


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target(target):
    """One head dimension and width of every kernel; the whole matrix is `python -m trilby.kernels.gpu matrix`."""
    for case in chosen(
        target,
        r"attention (forward|key_value|query) bfloat16 D 128 causal \d",
        r"attention (rows|merge) ",
        "norm (forward|backward) bfloat16 N (1024|65536)",
        "column sums bfl",
    ):
        assert case.faults(compile_call(case.call, case.target)) == [], case.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(torch.float16, 64),
        AttentionShape(torch.bfloat16, 64, is_causal=False),
        AttentionShape(torch.bfloat16, 40),
        AttentionShape(torch.bfloat16, 80),
        AttentionShape(torch.bfloat16, 96),
    ],
    ids=str,
)
def test_features_that_change_the_code(shape):
    tiles = AttentionTiles(128, 64, 8, 2)
    for call in (shape.forward(tiles), shape.query(tiles), shape.key_value(AttentionTiles(32, 64, 8, 2)), shape.rows()):
        compilation = compile_call(call, SM_90)
        assert compilation.spills == compilation.local_bytes == 0
        assert compilation.wide_share > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"])
def test_whatever_is_asked_of_a_score(target):
    """Masks, slopes, softcap, dropout and a window at once; the backward's are in the matrix alone."""
    case = chosen(TARGETS[target], "attention forward bfloat16 .* everything")[0]
    assert case.faults(compile_call(case.call, case.target)) == [], case.name


def test_what_a_call_may_ask_for_is_in_the_matrix():
    names = [case.name for case in attention_cases(SM_90)]
    for kernel in ("forward", "key_value", "query"):
        for feature in ("", " window", " dropout", " everything"):
            assert any(re.search(rf"{kernel} bfloat16 D \d+ causal{feature} \d", name) for name in names)
    assert any("decode bfloat16 D 128 causal paged" in name for name in names)


def test_a_smaller_limit_or_a_missing_instruction_is_a_fault():
    case = next(attention_cases(SM_90))
    compilation = compile_call(case.call, SM_90)
    small = Target("sm_90", "cuda", 90, 32, compilation.shared_bytes - 1)
    spoiled = type(compilation)(**{**vars(compilation), "spills": 1, "matrix_instructions": 0, "wide_share": 0.4})
    assert case.faults(compilation) == []
    assert len(type(case)(case.name, small, case.call, True).faults(spoiled)) == 4


def test_what_32_bits_cannot_hold_compiles_to_64():
    shape = AttentionShape(torch.bfloat16, 64)
    near = shape.forward(AttentionTiles(128, 64, 8, 2))
    assert near.arguments["ADDRESSES"] == "narrow"
    far = torch.empty_strided((2, 12, 1024, 64), (1, 1, 2**25, 1), dtype=torch.bfloat16, device="meta")
    assert addresses(False, (128, far)) == "wide"
    assert addresses(False, (64, far)) == "narrow"
    assert addresses(True, (128, far)) == "products"
    farther = torch.empty_strided((2, 12, 1024, 64), (1, 1, 2**31, 1), dtype=torch.bfloat16, device="meta")
    assert addresses(True, (128, farther)) == "wide"
    wide = type(near)(near.kernel, near.grid, {**near.arguments, "ADDRESSES": "wide"}, near.options)
    assert compile_call(wide, SM_90).spills == 0


def test_a_stride_is_compiled_in_where_keys_and_values_share_it():
    tiles = AttentionTiles(128, 128, 8, 2, products=True, compiled_stride=True)
    key = torch.empty(2, 1024, 12, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    other, far = key.contiguous(), torch.empty_strided((2, 12, 1024, 128), (1, 1, 2**24, 1), device="meta")
    assert key_addresses(tiles, key, key) == 12 * 128
    assert key_addresses(replace(tiles, compiled_stride=False), key, key) == "products"
    assert key_addresses(tiles, key, other) == "products"
    assert key_addresses(tiles, far, far) == "products"


def by_descriptor_of(target, *patterns):
    return chosen(TARGETS[target], *(f"attention forward by descriptor {pattern}" for pattern in patterns))


@pytest.mark.parametrize(
    "case",
    [
        *by_descriptor_of("sm_90", r"bfloat16 D 64 causal \d"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for target, name in (("sm_90", "bfloat16 D 128 causal window"), ("sm_100", r"float16 D 128 causal \d"))
            for case in by_descriptor_of(target, name)
        ),
    ],
    ids=lambda case: f"{case.target.name} {case.name}",
)
def test_tensor_descriptors_are_machine_instructions(case):
    """What a tile of keys and of values takes is one instruction, and no register spills."""
    compilation = compile_call(case.call, case.target)
    assert case.least_descriptor_loads > 0
    assert case.faults(compilation) == []
    without = replace(compilation, descriptor_loads=0)
    assert case.faults(without) == [f"0 loads by tensor descriptors, {case.least_descriptor_loads} are the least"]


def test_every_row_that_loads_by_descriptors_is_in_the_matrix():
    for row in FORWARD_BY_DESCRIPTOR:
        for target in row.targets:
            assert TARGETS[target].has_descriptors
            for dtype in ("bfloat16", "float16"):
                names = (rf"{dtype} D {row.head_dim} causal{feature} \d" for feature in ("", " window"))
                assert len(by_descriptor_of(target, *names)) == 2


def test_which_tensors_a_descriptor_can_load():
    shape, strides = (2, 12, 1024, 64), (12 * 64 * 1024, 64, 12 * 64, 1)
    key = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    assert by_descriptor(key, 64, is_paged=False)
    assert not by_descriptor(key, 64, is_paged=True)
    assert not by_descriptor(key, 16, is_paged=False)  # as small as what is guarded
    for refused in (
        torch.empty(2, 12, 64, 1024, dtype=torch.bfloat16, device="meta").transpose(2, 3),  # columns apart
        torch.empty(2, 12, 1024, 60, dtype=torch.bfloat16, device="meta"),  # rows of 120 bytes
        torch.empty(2, 12, 1024, 72, dtype=torch.bfloat16, device="meta")[..., 4:68],  # begins at 8 bytes
        torch.empty(2, 12, 1, 64, dtype=torch.bfloat16, device="meta").expand(shape),  # one row, again and again
    ):
        assert not by_descriptor(refused, 64, is_paged=False)
    assert key_addresses(AttentionTiles(128, 64, 8, 2, descriptors=True), key, key) == "descriptors"
    assert key_addresses(AttentionTiles(128, 64, 8, 2, descriptors=True), key, key, is_paged=True) == "pages"


def test_the_norms_are_in_the_matrix():
    names = {case.name for case in norm_cases(SM_90)}
    assert {
        "norm forward float32 N 65536 dropout",
        "norm backward bfloat16 N 65536 (1)",
        "column sums float32",
    } <= names
