"""Machine code read as text: its instructions and its innermost loops."""

from trilby.kernels.gpu.assembly import Program


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
