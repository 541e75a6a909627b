"""The model of the static report: against published peaks, published reckonings and published measurements."""

import pytest
from trilby.bench.static.bound import Loop, access_bytes, bound, pipe_of, shared_bytes, tensor_flops
from trilby.bench.static.multiprocessor import MULTIPROCESSORS, RATES, resident_programs
from trilby.kernels.gpu.assembly import Instruction

# Data sheets: dense tensor cores in half precision, TFLOP/s; multiprocessors; GHz at which that holds.
PEAKS = {"sm_80": (312, 108, 1.41), "sm_90": (989, 132, 1.83), "sm_100": (2250, 148, 1.85), "sm_89": (362, 142, 2.49)}


@pytest.mark.parametrize("target", PEAKS)
def test_the_tensor_cores_peak_is_the_data_sheets(target):
    tflops, processors, ghz = PEAKS[target]
    assert RATES[target].tensor_flops * processors * ghz / 1e3 == pytest.approx(tflops, rel=0.01)


def test_exponentials_per_second_are_flash_attention_3s():
    """Shah et al. (2024), 3.1: 3.9 TFLOP/s of special functions on an H100."""
    _, processors, ghz = PEAKS["sm_90"]
    assert RATES["sm_90"].special_lanes * processors * ghz / 1e3 == pytest.approx(3.9, abs=0.05)


def attention(D, warps=8, block_m=128, block_n=128, exponentials=1, others=0):
    """The forward's loop reduced to its products and `exponentials` and `others` per score, on Hopper."""
    scores_of_a_thread = block_m * block_n // (32 * warps)
    products = [Instruction(f"HGMMA.64x{block_n}x16.F32.BF16", "R0, R1, gdesc[UR4], R0")] * (D // 16)
    products += [Instruction(f"HGMMA.64x{D}x16.F32.BF16", "R0, R1, gdesc[UR4], R0")] * (block_n // 16)
    special = [Instruction("MUFU.EX2")] * (scores_of_a_thread * exponentials)
    return Loop((*products, *special, *[Instruction("FFMA")] * (scores_of_a_thread * others)), warps)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_products_make_four_operations_per_score_and_dimension(D):
    assert attention(D).flops == 4 * D * 128 * 128


def test_exponentials_take_half_the_time_of_the_products_at_head_dimension_128():
    """Shah et al. (2024), 3.1: "the exponential can take up to 50% of the cycle" compared with the products."""
    loop = attention(128)
    cycles = bound(loop, RATES["sm_90"], loop.flops).cycles
    assert cycles["special"] / cycles["tensor"] == 0.5


# TFLOP/s measured on an H100 (flash-attention's charts, forward, without a mask, 16k positions), by head dimension:
# Triton's tutorial, FlashAttention-2, cuDNN and FlashAttention-3, all with one exponential a score.
MEASURED = {64: (403, 324, 413, 497), 128: (395, 370, 595, 648)}


@pytest.mark.parametrize("D", MEASURED)
def test_what_was_measured_lies_below_the_bound_and_the_best_near_taking_turns(D):
    loop = attention(D)
    modeled = bound(loop, RATES["sm_90"], loop.flops)
    shares = [tflops / 989 for tflops in MEASURED[D]]
    assert max(shares) <= modeled.tensor_use
    # FlashAttention-3 overlaps some of the softmax: it is the one that takes turns or does a little better.
    assert max(shares) == pytest.approx(modeled.tensor_use_in_turns, rel=0.05)


@pytest.mark.parametrize(("D", "tflops"), [(64, 176), (128, 203)])
def test_what_flash_attention_2_reaches_on_an_a100_lies_below_the_bound(D, tflops):
    """Forward and backward without a mask: no loop has fewer than 2 products for each exponential."""
    products = [Instruction("HMMA.16816.F32.BF16")] * (4 * D * 64 * 64 // (4 * 4096))
    loop = Loop((*products, *[Instruction("MUFU.EX2")] * (64 * 64 // 128)), warps=4)
    assert loop.flops == 4 * D * 64 * 64
    assert tflops / 312 <= bound(loop, RATES["sm_80"], loop.flops).tensor_use


def test_products_of_single_warps_leave_a_third_of_hoppers_peak():
    """Dao (2024): the older instruction reaches about 2/3 of the H100's tensor cores."""
    loop = Loop((Instruction("HMMA.16816.F32.BF16"),) * 64, warps=4)
    assert bound(loop, RATES["sm_90"], loop.flops).tensor_use == pytest.approx(2 / 3)


def test_the_busiest_pipe_bounds():
    few, many = attention(128, others=1), attention(128, others=20)
    assert bound(few, RATES["sm_90"], few.flops).pipe == "tensor"
    assert bound(many, RATES["sm_90"], many.flops).pipe in ("issue", "fma")
    assert bound(many, RATES["sm_90"], many.flops).tensor_use < 0.9


def test_work_done_twice_is_no_use_of_the_tensor_cores():
    loop = attention(128)
    assert bound(loop, RATES["sm_90"], loop.flops / 2).tensor_use == pytest.approx(0.5)


def test_tf32_has_half_the_peak():
    loop = Loop((Instruction("HMMA.1688.F32.TF32"),) * 8, warps=4)
    assert bound(loop, RATES["sm_80"], loop.flops).tensor_use == 1
    assert bound(loop, RATES["sm_80"], loop.flops).cycles["tensor"] == 2 * loop.flops / 2048


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x256x16.F32.BF16", 2 * 64 * 256 * 16 // 4),
        ("v_mfma_f32_32x32x8_bf16", 2 * 32 * 32 * 8),
        ("v_wmma_f32_16x16x16_bf16", 2 * 16 * 16 * 16),
        ("UTCHMMA", None),
    ],
)
def test_an_instruction_tells_what_it_multiplies(opcode, flops):
    assert tensor_flops(Instruction(opcode)) == flops


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("FFMA.FTZ", "fma"),
        ("IMAD.MOV.U32", "fma"),
        ("FMNMX3", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("MUFU.EX2", "special"),
        ("I2F.RP", "special"),
        ("LDSM.16.M88.4", "memory"),
        ("SHFL.BFLY", "memory"),
        ("BAR.SYNC.DEFER_BLOCKING", "other"),
        ("UIADD3", "other"),
        ("WARPGROUP.DEPBAR.LE", "other"),
        ("HGMMA.64x64x16.F32", "tensor"),
        ("v_pk_mul_f32", "fma"),
        ("v_exp_f32_e32", "special"),
        ("v_max3_f32", "alu"),
        ("ds_read_b128", "memory"),
        ("s_waitcnt", "other"),
    ],
)
def test_an_instruction_goes_to_its_pipe(opcode, pipe):
    assert pipe_of(Instruction(opcode)) == pipe


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("LDS.128", "R0, [R1]", 512),
        ("LDS", "R0, [R1]", 128),
        ("LDSM.16.M88.4", "R0, [R1]", 512),
        ("STSM.16.M88", "[R1], R0", 128),
        ("LDGSTS.E.BYPASS.128", "[R0], desc[UR4][R2.64]", 512),
        ("LDG.E.128", "R0, desc[UR4][R2.64]", 0),
        ("HGMMA.64x128x16.F32.BF16", "R0, R4, gdesc[UR4], R0", 128 * 16 * 2 / 4),
        ("HGMMA.64x128x16.F32.BF16", "R0, gdesc[UR4], R0", (128 + 64) * 16 * 2 / 4),
    ],
)
def test_bytes_of_shared_memory(opcode, operands, expected):
    assert shared_bytes(Instruction(opcode, operands)) == expected


def test_bytes_of_an_access():
    opcodes = ("LDG.E.128", "LDG.E.64", "STG.E", "LDG.E.U16", "STG.E.U8")
    assert [access_bytes(Instruction(opcode)) for opcode in opcodes] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "programs"),
    [
        ("sm_80", 4, 128, 0, 4),  # 65,536 / (128 x 128)
        ("sm_80", 8, 255, 0, 1),
        ("sm_90", 8, 168, 100 * 1024, 1),  # 12 warps of 168 registers fit
        ("sm_90", 4, 32, 227 * 1024, 1),
        ("sm_90", 1, 16, 0, 32),
        ("sm_90", 4, 32, 0, 16),
        ("sm_86", 4, 32, 0, 12),
        ("gfx942", 4, 256, 0, 2),
    ],
)
def test_what_fits_on_a_multiprocessor(target, warps, registers, shared, programs):
    assert resident_programs(MULTIPROCESSORS[target], warps, registers, shared) == programs
