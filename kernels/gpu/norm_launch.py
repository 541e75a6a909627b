"""Launch parameters of the norms as data: tables, each row with its reason, and the functions that choose from them."""

from __future__ import annotations

from dataclasses import dataclass

from .measured import measured_numbers
from .targets import Device


@dataclass(frozen=True)
class NormTiles:
    """How a norm kernel is cut: `programs` at most walk over the rows, `block_n` columns at a time."""

    block_n: int
    num_warps: int
    programs: int


@dataclass(frozen=True)
class NormRow:
    """One row of a norm table: rows of up to `width` elements, in programs of `num_warps` warps, and why.

    Attributes:
        width: The widest it serves.
        num_warps: The launch parameter.
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
    NormRow(8192, 8, "up to 32 elements a thread, with weight and bias 96 registers"),
    NormRow(
        16384,
        16,
        "32 elements a thread, all of their 128 registers; with dropout they spill, on sm_120 8 bytes without",
        drops=False,
        spills=("sm_120",),
    ),
)
NORM_BACKWARD = (
    NormRow(256, 1, "8 elements a thread, each with 5 float32 values that live through the loop"),
    NormRow(1024, 4, "8 elements a thread"),
    NormRow(2048, 8, "8 elements a thread"),
    NormRow(
        8192,
        16,
        "up to 16 elements a thread: 80 of the 128 registers that 512 threads may have; on sm_100 8 bytes spill",
        spills=("sm_100",),
    ),
)
# A chunk of a row that is wider than its table goes. Of 4096 columns LLVM unrolls the 16 that 65,536 take, and spills.
WIDE = NormRow(2048, 4, "16 elements a thread; with 8, in 8 warps, 2 registers spill on sm_100")
# Enough warps on a processor to hide the memory's latency; the backward has half of it, for each program writes
# its part of the weights' gradient.
FORWARD_WARPS = 32
BACKWARD_WARPS = 16


def norm_forward_tiles(device: Device, width: int, drops: bool = False) -> NormTiles:
    """The launch parameters of the forward for rows of `width` elements; wider ones than block_n go in chunks."""
    table = tuple(row for row in NORM_FORWARD if row.drops or not drops)
    return _norm_tiles("norm_forward", table, FORWARD_WARPS, device, width)


def norm_backward_tiles(device: Device, width: int) -> NormTiles:
    """The launch parameters of the backward for rows of `width` elements; wider ones than block_n go in chunks."""
    return _norm_tiles("norm_backward", NORM_BACKWARD, BACKWARD_WARPS, device, width)


def _norm_tiles(name: str, table: tuple[NormRow, ...], warps: int, device: Device, width: int) -> NormTiles:
    for row in table:
        if width <= row.width:
            # Random words come in groups of 64 columns.
            block_n = max(64, 1 << (width - 1).bit_length())
            break
    else:
        row, block_n = WIDE, WIDE.width
    numbers = None if row is WIDE else measured_numbers((name, device.target.name, "", row.width, 0))
    num_warps = row.num_warps if numbers is None else numbers["num_warps"]
    return NormTiles(block_n, num_warps, device.processors * max(warps // num_warps, 1))
