"""Launch parameters of the norms as data: tables, each row with its reason, and the functions that choose from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .measured import Place, measured_numbers
from .targets import Device


@dataclass(frozen=True)
class NormTiles:
    """How a norm kernel is cut: at most `programs` walk over rows, `block_m` rows and `block_n` columns at a time."""

    block_n: int
    num_warps: int
    programs: int
    block_m: int = 1

    def programs_of(self, rows: int, chunks: int = 1) -> int:
        """How many of them walk over so many rows in so many chunks: the fewest that need no more turns than all would.

        4096 rows on 132 multiprocessors are 32 turns, for 128 programs as well; each less reads its weights and writes
        its part of their gradients.
        """
        blocks = -(-rows // self.block_m)
        turns = -(-blocks // max(self.programs // chunks, 1))
        return -(-blocks // max(turns, 1))


@dataclass(frozen=True)
class NormRow:
    """One row of a norm table: rows of up to `width` elements, in programs of `num_warps` warps, and why.

    Attributes:
        width: The widest it serves.
        num_warps: The launch parameter, of warps of 32 threads; half as many of AMD's 64.
        reason: Why so many.
        drops: It serves dropout too.
        spills: Targets where float32 runs out of registers, by a few: reading the row twice would cost more.
    """

    width: int
    num_warps: int
    reason: str
    drops: bool = True
    spills: tuple[str, ...] = ()


NORM_FORWARD = (
    NormRow(512, 1, "a warp holds a row, 16 elements a thread: sums need no barrier"),
    NormRow(1024, 2, "16 elements a thread; more programs in flight hide more of the memory's latency than wider ones"),
    NormRow(2048, 4, "16 elements a thread"),
    NormRow(8192, 8, "up to 32 elements a thread, with weight and bias 127 registers, with dropout 211"),
    NormRow(
        16384,
        16,
        "32 elements a thread, all of their 128 registers; with dropout they spill, on sm_120 8 bytes without",
        drops=False,
        spills=("sm_120",),
    ),
)
# Each program writes a part of the weights' gradients, 8 bytes a column: four of 4 warps write four times as much as
# one of 16. On H200 they are faster all the same: a barrier holds fewer warps, and the others' loads go on meanwhile.
NORM_BACKWARD = (
    NormRow(1024, 4, "8 elements a thread; on H200 1.24 times as fast as 16 warps with 4 rows at once, 2 warps 1.28"),
    NormRow(4096, 8, "16 elements a thread; on H200 1.53 times as fast as 16 warps, 4 warps 1.31"),
    NormRow(
        8192,
        16,
        "16 elements a thread take all 128 registers that 512 threads may have; on sm_100 8 bytes spill",
        spills=("sm_100",),
    ),
)
# A chunk of a row that is wider than its table goes. Of 4096 columns LLVM unrolls the 16 that 65,536 take, and spills.
WIDE = NormRow(2048, 4, "16 elements a thread; with 8, in 8 warps, 2 registers spill on sm_100")
# Enough warps on a processor to hide the memory's latency.
FORWARD_WARPS = 32
BACKWARD_WARPS = 16
# What a thread has of several rows at least: 16 bytes of half precision, the widest access there is.
ELEMENTS = 8


def norm_forward_tiles(device: Device, width: int, drops: bool = False) -> NormTiles:
    """The launch parameters of the forward for rows of `width` elements; wider ones than block_n go in chunks."""
    table = tuple(row for row in NORM_FORWARD if row.drops or not drops)
    return _norm_tiles("norm_forward", table, FORWARD_WARPS, device, width)


def norm_backward_tiles(device: Device, width: int) -> NormTiles:
    """The launch parameters of the backward for rows of `width` elements; wider ones than block_n go in chunks."""
    tiles = _norm_tiles("norm_backward", NORM_BACKWARD, BACKWARD_WARPS, device, width)
    if width > tiles.block_n:
        return tiles
    return replace(tiles, block_m=max(tiles.num_warps * device.target.warp_size * ELEMENTS // tiles.block_n, 1))


def _norm_tiles(name: str, table: tuple[NormRow, ...], warps: int, device: Device, width: int) -> NormTiles:
    for row in table:
        if width <= row.width:
            # Random words come in groups of 64 columns.
            block_n = max(64, 1 << (width - 1).bit_length())
            break
    else:
        row, block_n = WIDE, WIDE.width
    numbers = None if row is WIDE else measured_numbers(Place(name, device.target.name, "", row.width, 0, ""))
    warps_of_32 = device.target.warp_size // 32
    num_warps = max(row.num_warps // warps_of_32, 1) if numbers is None else numbers["num_warps"]
    return NormTiles(block_n, num_warps, device.processors * max(warps // (num_warps * warps_of_32), 1))
