"""What one multiprocessor can do in a clock, by target: the machine that `bound.py` counts cycles of.

Rates are those that NVIDIA documents: the CUDA C++ Programming Guide's tables "Throughput of Native Arithmetic
Instructions" and "Technical Specifications per Compute Capability", and for tensor cores the data sheets' dense rate in
half precision with float32 accumulation, divided by multiprocessors and clock. Where products of one architecture
differ (consumer cards accumulate in float32 at half the rate), the fastest is taken: the model bounds from above.
AMD's targets have what limits residency alone; their instructions are counted, not timed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """One streaming multiprocessor (AMD: compute unit).

    Attributes:
        partitions: Schedulers, each with its own registers and arithmetic; a warp lives in one.
        registers: 32-bit registers of a thread's column in a partition: warps there x registers of each must fit.
        register_step: Registers are given to a thread in multiples of this.
        warps: Most warps resident in a partition.
        programs: Most programs (thread blocks) resident on the multiprocessor.
        shared_memory: Bytes, for all programs.
        reserved: Bytes of it that the system takes for each program.
    """

    partitions: int
    registers: int
    register_step: int
    warps: int
    programs: int
    shared_memory: int
    reserved: int = 0


@dataclass(frozen=True)
class Rates:
    """What an NVIDIA multiprocessor does in a clock.

    Attributes:
        tensor_flops: Multiplications and additions of the tensor cores, dense, half precision, float32 accumulation.
        warp_tensor_share: How much of that `mma` instructions of single warps (HMMA) reach.
        fma_lanes: Threads whose float32 multiply-add starts.
        alu_lanes: Threads whose integer, logic, comparison, minimum or conversion to half precision starts.
        special_lanes: Threads whose exp2, reciprocal or conversion between integer and float starts.
        memory_lanes: Threads whose load, store or shuffle starts.
        shared_bytes: Bytes that shared memory takes or gives.
    """

    tensor_flops: int
    fma_lanes: int
    warp_tensor_share: float = 1.0
    alu_lanes: int = 64
    special_lanes: int = 16
    memory_lanes: int = 32
    shared_bytes: int = 128


def _nvidia(warps: int, programs: int, shared_kib: int) -> Multiprocessor:
    return Multiprocessor(4, 512, 8, warps // 4, programs, shared_kib * 1024, reserved=1024)


MULTIPROCESSORS = {
    "sm_80": _nvidia(64, 32, 164),
    "sm_86": _nvidia(48, 16, 100),
    "sm_89": _nvidia(48, 24, 100),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228),
    "sm_120": _nvidia(48, 24, 100),
    # CDNA: 512 registers a lane, accumulation registers among them; RDNA 3: 1536 of 32 lanes.
    "gfx90a": Multiprocessor(4, 512, 8, 8, 32, 64 * 1024),
    "gfx942": Multiprocessor(4, 512, 8, 8, 32, 64 * 1024),
    "gfx1100": Multiprocessor(2, 1536, 24, 16, 32, 64 * 1024),
}

RATES = {
    "sm_80": Rates(tensor_flops=2048, fma_lanes=64),
    "sm_86": Rates(tensor_flops=1024, fma_lanes=128),
    "sm_89": Rates(tensor_flops=1024, fma_lanes=128),
    # Dao, "FlashAttention-3" (2024): without instructions of warpgroups, about 2/3 of the peak can be reached.
    "sm_90": Rates(tensor_flops=4096, fma_lanes=128, warp_tensor_share=2 / 3),
    "sm_100": Rates(tensor_flops=8192, fma_lanes=128),
    "sm_120": Rates(tensor_flops=1024, fma_lanes=128),
}


def resident_programs(processor: Multiprocessor, warps: int, registers: int, shared_bytes: int) -> int:
    """How many programs of `warps` warps, each thread with `registers`, fit on a multiprocessor at once."""
    of_a_thread = -(-max(registers, 1) // processor.register_step) * processor.register_step
    warps_in_partition = min(processor.warps, processor.registers // of_a_thread)
    by_warps = processor.partitions * warps_in_partition // warps
    by_memory = processor.shared_memory // max(shared_bytes + processor.reserved, 1)
    return min(by_warps, by_memory, processor.programs)
