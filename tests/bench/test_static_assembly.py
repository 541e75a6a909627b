"""Machine code read as text: instructions, loops, and what a norm moves."""

import pytest
from trilby.bench.static.assembly import Program
from trilby.bench.static.traffic import Traffic, traffic


def sass(*lines):
    """Instructions and labels in nvdisasm's layout."""
    numbered = (f"{x}:" if x.startswith(".L") else f"        /*{n:04x}*/   {x} ;" for n, x in enumerate(lines))
    return "//-----\n" + "\n".join(numbered)


def opcodes(text, wanted="HMMA"):
    return [[one.opcode for one in loop] for loop in Program.of(text).loops(lambda one: one.is_in(wanted))]


def test_a_predicate_and_the_operands_are_no_part_of_the_opcode():
    program = Program.of(sass("@!P5 LDG.E.128 R4, desc[UR4][R2.64]", "HGMMA.64x128x16.F32 R24, R8, gdesc[UR8], R24"))
    assert [(one.opcode, one.is_predicated) for one in program.instructions] == [
        ("LDG.E.128", True),
        ("HGMMA.64x128x16.F32", False),
    ]
    assert program.instructions[1].operands == "R24, R8, gdesc[UR8], R24"


def test_the_innermost_loop_with_a_product_is_found():
    text = sass(
        "MOV R0, R1", ".L_x_0", "IADD3 R0", ".L_x_1", "HMMA.16816 R0", "@P0 BRA `(.L_x_1)", "FADD R0",
        "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert opcodes(text) == [["HMMA.16816", "BRA"]]


def test_two_loops_one_after_the_other():
    text = sass(
        ".L_x_0", "HMMA.1 R0", "@P0 BRA `(.L_x_0)", "MOV R1", ".L_x_1", "HMMA.2 R0", "FSEL R0", "@P0 BRA `(.L_x_1)",
        "EXIT",
    )  # fmt: skip
    assert opcodes(text) == [["HMMA.1", "BRA"], ["HMMA.2", "FSEL", "BRA"]]


def test_a_wait_inside_a_loop_belongs_to_it():
    text = sass(
        ".L_x_0", ".L_x_1", "SYNCS R0", "@!P1 BRA `(.L_x_1)", "HMMA.1 R0", "@P0 BRA `(.L_x_0)", "EXIT"
    )  # fmt: skip
    assert opcodes(text) == [["SYNCS", "BRA", "HMMA.1", "BRA"]]


def test_a_wait_behind_the_loop_makes_no_loop_of_what_it_returns_into():
    text = sass(
        ".L_x_0", "SYNCS R0", "@!P1 BRA `(.L_x_9)", ".L_x_1", "HMMA.1 R0", "@P0 BRA `(.L_x_0)", "STG R0", "EXIT",
        ".L_x_9", "SYNCS R1", "@!P1 BRA `(.L_x_9)", "BRA `(.L_x_1)",
    )  # fmt: skip
    assert opcodes(text) == [["SYNCS", "BRA", "HMMA.1", "BRA", "SYNCS", "BRA", "BRA"]]


def test_a_straight_program_has_no_loop():
    assert opcodes(sass("HMMA.1 R0", "@P0 BRA `(.L_x_0)", "FADD R0", ".L_x_0", "EXIT")) == []


def test_amds_assembly_is_read_too():
    text = "\n".join(
        ["\ts_mov_b32 s0, 0", ".LBB0_1:   ; =>This Inner Loop Header", "\tv_mfma_f32_32x32x8_bf16 a[0:15], v0, v1, 0",
         "\ts_waitcnt lgkmcnt(0)   ; wait", "\ts_cbranch_scc0 .LBB0_1", "\ts_endpgm"]
    )  # fmt: skip
    (loop,) = Program.of(text).loops(lambda one: one.opcode.startswith("v_mfma"))
    assert [one.opcode for one in loop] == ["v_mfma_f32_32x32x8_bf16", "s_waitcnt", "s_cbranch_scc0"]


KERNEL = """module {
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %rows: i32 loc("r"(#loc))) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c512_i32 = arith.constant 512 : i32 loc(#loc1)
    %c2000_i32 = arith.constant 2000 : i32 loc(#loc1)
    %w = tt.load %1, %mask, %cst : tensor<512x!tt.ptr<f32>> loc(#loc2)
    scf.for %row = %0 to %rows step %1  : i32 {
      %y = tt.load %2, %mask, %cst : tensor<512x!tt.ptr<bf16>> loc(#loc3)
      %sum:2 = scf.for %column = %c0_i32 to %c2000_i32 step %c512_i32 iter_args(%a = %b) -> (f32)  : i32 {
        %z = tt.load %3 : tensor<16x32x!tt.ptr<i8>> loc(#loc4)
        scf.yield %a : f32 loc(#loc4)
      } loc(#loc5)
      tt.store %4, %mean : !tt.ptr<f32> loc(#loc6)
    } loc(#loc7)
    tt.store %5, %sum, %mask : tensor<512x!tt.ptr<f32>> loc(#loc8)
    tt.return loc(#loc9)
  } loc(#loc)
} loc(#loc)
"""


def test_what_is_moved_in_the_loop_over_rows_and_outside_of_it():
    assert traffic(KERNEL) == Traffic(per_row=512 * 2 + 4 * 512 + 4, once=2 * 512 * 4)
    assert Traffic(10, 3).total(rows=100, programs=7) == 1021


def test_a_loop_that_takes_several_rows_moves_less_for_each():
    assert traffic(KERNEL, rows=2) == Traffic(traffic(KERNEL).per_row // 2, traffic(KERNEL).once)


def test_a_kernel_without_a_loop_moves_all_once():
    straight = KERNEL.replace("%0 to %rows step %1", "%c0_i32 to %c512_i32 step %c512_i32")
    assert traffic(straight).per_row == 0


@pytest.mark.parametrize("line", ["tt.load", "tt.store"])
def test_a_mutant_that_overlooks_an_access_is_noticed(line):
    assert traffic(KERNEL.replace(line, "tt.other", 1)) != traffic(KERNEL)
