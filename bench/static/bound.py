"""How fast a loop can run at best: cycles by pipe, counted in its machine code, and the pipe that bounds it.

The model. Programs are resident in numbers, so that the instructions of some fill the waits of others. In the limit
every pipe works all the time that it has work, and an iteration takes as long as its busiest pipe: a bound from above
on speed, which no schedule exceeds. A pipe's cycles are the instructions that it takes, each with the cycles that the
pipe's width makes of 32 threads (`multiprocessor.py`); costs are never overstated, so the bound holds. Latency, bank
conflicts, barriers and waits for memory are not in it: the other end, with the tensor cores in turns with everything
else as in a single program that waits for each product, is given beside it, and kernels are measured in between.

=============  ====================================================  ==============================================
pipe           instructions (Nsight Compute, Kernel Profiling Guide)  cycles of a multiprocessor, for each warp
=============  ====================================================  ==============================================
tensor         HMMA, HGMMA                                            2 M N K / its rate
fma            FFMA, FMUL, FADD, IMAD, HFMA2, packed ones as one      32 / fma lanes
alu            integer, logic, minimum, selection, F2FP               32 / alu lanes
special        MUFU, conversions between integer and float            32 / special lanes
memory         loads, stores, shuffles                                32 / memory lanes, or its bytes if more
shared memory  the operands of HGMMA that lie there, and the above    bytes / shared bytes
issue          every one                                              1 / 4
=============  ====================================================  ==============================================
"""

import re
from dataclasses import dataclass
from functools import cached_property

from trilby.kernels.gpu.assembly import Instruction

from .multiprocessor import Rates

WARP = 32
TENSOR = "tensor"
PIPES = (TENSOR, "fma", "alu", "special", "memory", "other")

_FMA = ("FFMA", "FMUL", "FADD", "IMAD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HMUL2", "HADD2")
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV")
_MEMORY = (
    *("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "LDL", "STL", "LD", "ST", "RED", "REDG"),
    *("ATOM", "ATOMG", "ATOMS", "LDTM", "STTM", "UTMALDG", "UTMASTG", "UBLKCP", "SYNCS"),
)
_TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA", "QGMMA", "UTCQMMA")
# They take an issue slot and nothing that the model has: branches, barriers, waits, constants, the uniform datapath.
_OTHER = re.compile(
    r"^(U\w+|BRA|BAR|NOP|EXIT|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|LDC|LDCU|S2R|S2UR|R2UR|CS2R|BSSY|BSYNC"
    r"|ELECT|CALL|RET|ERRBAR|CCTL|YIELD|BPT|NANOSLEEP|PLOP3|P2R|R2P|VOTE|VOTEU|ACQBULK|DEPBAR|REDUX|ARRIVES|BREAK)$"
)


def pipe_of(instruction: Instruction) -> str:
    """Which of `PIPES` an NVIDIA or AMD instruction goes to."""
    name = instruction.opcode.partition(".")[0]
    if name[:1].islower():
        return _amd_pipe_of(name)
    for pipe, names in ((TENSOR, _TENSOR), ("fma", _FMA), ("special", _SPECIAL), ("memory", _MEMORY)):
        if name in names:
            return pipe
    return "other" if _OTHER.match(name) else "alu"


def _amd_pipe_of(name: str) -> str:
    if name.startswith(("v_mfma", "v_wmma", "v_smfmac")):
        return TENSOR
    if name.startswith(("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")):
        return "special"
    if re.match(r"v_(dual_)?(pk_)?(fma|fmac|fmaak|fmamk|mul|add|sub|mac|mad)\w*_f(32|16)", name):
        return "fma"
    if name.startswith(("ds_", "global_", "buffer_", "flat_", "scratch_")):
        return "memory"
    return "alu" if name.startswith("v_") else "other"


def tensor_flops(instruction: Instruction) -> int | None:
    """Multiplications and additions that one warp's share of a tensor-core instruction makes; None if unknown.

    HMMA.16816 is 16 x 8 x 16 by one warp; HGMMA.64x128x16 is that by four; v_mfma_f32_32x32x8 and v_wmma_f32_16x16x16
    are by one. Blackwell's UTCHMMA does not tell.
    """
    if found := re.match(r"HMMA\.(16)(8)(\d+)\.", instruction.opcode):
        warps = 1
    elif found := re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)\.", instruction.opcode):
        warps = 4
    elif found := re.match(r"v_(?:mfma|wmma)_[a-z]*\d+_(\d+)x(\d+)x(\d+)", instruction.opcode):
        warps = 1
    else:
        return None
    rows, columns, depth = map(int, found.groups())
    return 2 * rows * columns * depth // warps


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop, of all the warps of a program.

    Attributes:
        instructions: Of one warp.
        warps: That the program has, all of which run the loop.
        warp_size: Threads of a warp.
    """

    instructions: tuple[Instruction, ...]
    warps: int
    warp_size: int = WARP

    @cached_property
    def mix(self) -> dict[str, int]:
        """Instructions of one warp by pipe."""
        found = dict.fromkeys(PIPES, 0)
        for instruction in self.instructions:
            found[pipe_of(instruction)] += 1
        return found

    @cached_property
    def flops(self) -> int | None:
        """Of all tensor-core instructions of the program; None if one does not tell."""
        each = [tensor_flops(one) for one in self.instructions if pipe_of(one) == TENSOR]
        known = [flops for flops in each if flops is not None]
        return self.warps * sum(known) if len(known) == len(each) else None

    @property
    def is_tf32(self) -> bool:
        """Whether its products are of TF32, of which tensor cores make half as many."""
        return any(".TF32" in one.opcode for one in self.instructions)

    def per_thread(self, pipe: str | None = None) -> int:
        """Instructions of all threads in `pipe`, or in all but the tensor cores'."""
        count = len(self.instructions) - self.mix[TENSOR] if pipe is None else self.mix[pipe]
        return self.warp_size * self.warps * count


@dataclass(frozen=True)
class Bound:
    """Cycles of a multiprocessor that one iteration of a loop takes.

    Attributes:
        cycles: By pipe.
        peak: What the products that are needed would take at the peak rate.
    """

    cycles: dict[str, float]
    peak: float

    @property
    def pipe(self) -> str:
        """The busiest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def tensor_use(self) -> float:
        """The most of the tensor cores' peak that the loop can reach, everything overlapped."""
        return self.peak / max(self.cycles.values())

    @property
    def tensor_use_in_turns(self) -> float:
        """The same where tensor cores and everything else take turns."""
        return self.peak / (self.cycles[TENSOR] + max(v for k, v in self.cycles.items() if k != TENSOR))


def bound(loop: Loop, rates: Rates, useful_flops: float) -> Bound:
    """Cycles by pipe of one iteration, of whose products `useful_flops` are needed.

    Small tiles make some warps multiply the same again; where instructions do not tell what they multiply, it is taken
    that they multiply what is needed.
    """
    warps, mix = loop.warps, loop.mix
    peak = useful_flops / (rates.tensor_flops / 2 if loop.is_tf32 else rates.tensor_flops)
    cycles = {
        TENSOR: max(peak, warps * sum(_tensor_cycles(one, rates) for one in loop.instructions)),
        "fma": warps * mix["fma"] * WARP / rates.fma_lanes,
        "alu": warps * mix["alu"] * WARP / rates.alu_lanes,
        "special": warps * mix["special"] * WARP / rates.special_lanes,
        "memory": warps * sum(_memory_cycles(one, rates) for one in loop.instructions),
        "shared memory": warps * sum(map(shared_bytes, loop.instructions)) / rates.shared_bytes,
        "issue": warps * len(loop.instructions) / 4,
    }
    return Bound(cycles, peak)


def _tensor_cycles(instruction: Instruction, rates: Rates) -> float:
    rate = rates.tensor_flops * (rates.warp_tensor_share if instruction.is_in("HMMA") else 1.0)
    return (tensor_flops(instruction) or 0) / (rate / 2 if ".TF32" in instruction.opcode else rate)


def _memory_cycles(instruction: Instruction, rates: Rates) -> float:
    if pipe_of(instruction) != "memory":
        return 0.0
    return max(WARP / rates.memory_lanes, shared_bytes(instruction) / rates.shared_bytes)


def shared_bytes(instruction: Instruction) -> float:
    """Bytes of shared memory that one warp's share of an instruction reads or writes."""
    name, _, modifiers = instruction.opcode.partition(".")
    if name in ("LDSM", "STSM"):  # matrices of 8 x 8 half-precision elements: 1, 2 or 4
        matrices = modifiers.rpartition(".")[2]
        return 128 * (int(matrices) if matrices.isdigit() else 1)
    if name in ("LDS", "STS", "LDGSTS"):
        return WARP * access_bytes(instruction)
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction.opcode)
    if not found:
        return 0.0
    rows, columns, depth = map(int, found.groups())
    itemsize = 4 if ".TF32" in instruction.opcode else 2
    in_memory = columns + (rows if re.match(r"R\d+, *gdesc", instruction.operands) else 0)
    return in_memory * depth * itemsize / 4


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one thread reads or writes with a load or store."""
    parts = instruction.opcode.split(".")
    for width in (128, 64):
        if str(width) in parts:
            return width // 8
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((narrow[part] for part in parts if part in narrow), 4)
