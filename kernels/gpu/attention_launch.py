"""Launch parameters of attention as data: tables, each row with its reason, and the pure functions that choose.

A row serves the targets it names, up to its head dimension and query length; the first row that serves a call is
taken. Reasons tell what the compiler reports, which the tests check for every row: nothing may spill, and shared memory
must suffice. They speak of the largest tile of a family that fits, because the fewer tiles, the fewer times keys and
values are read; which of the tiles that fit is fastest, only a GPU can tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .measured import Place, measured_numbers
from .targets import Target


@dataclass(frozen=True)
class AttentionTiles:
    """How an attention kernel is cut: tiles of `block_m` queries and `block_n` keys.

    Attributes:
        block_m: Queries of a tile.
        block_n: Keys of a tile.
        num_warps: That a program has.
        num_stages: Tiles that are loaded while earlier ones are multiplied, and those.
        products: Addresses are products (`tile.load_tokens`): fewer instructions and, of large tiles, fewer registers.
        prefetch_masked: The gradients of keys and values load masked tiles ahead, too, which takes registers.
        compiled_stride: The forward has the stride from key to key and from value to value compiled in, if it is the
            same: it changes with the model, not with its batches. Addresses then take one instruction for 16 bytes.
        descriptors: The forward loads keys and values by tensor descriptors: one thread asks for a tile, and the tensor
            memory accelerator computes addresses. `Target.has_descriptors` says where, and `by_descriptor` of which
            tensors; others are loaded as if this were not asked for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    products: bool = False
    prefetch_masked: bool = True
    compiled_stride: bool = False
    descriptors: bool = False


@dataclass(frozen=True)
class DecodeTiles:
    """How the decode kernel is cut: a program has all rows of a key head and `split_keys` keys."""

    attention: AttentionTiles
    split_keys: int


@dataclass(frozen=True)
class RowTiles:
    """How a kernel without products is cut: a program holds `block_m` rows."""

    block_m: int
    num_warps: int


@dataclass(frozen=True)
class Row:
    """One row of a table: what it serves, the tiles, and why these.

    Attributes:
        targets: Names of `TARGETS`.
        arithmetic: "half" (float16, bfloat16), "tf32" or "ieee" (float32).
        head_dim: The largest it serves.
        tiles: The launch parameters.
        reason: Why these.
        q_len: The longest query it serves.
        scores: "plain" products, "rich" ones, which masks, slopes, softcap or dropout change, or "any".
        spills: The compiler runs out of registers: right, but slower than a row that did not would be.
    """

    targets: tuple[str, ...]
    arithmetic: str
    head_dim: int
    tiles: AttentionTiles
    reason: str
    q_len: int = 2**31
    scores: str = "plain"
    spills: bool = False


@dataclass(frozen=True)
class BackwardTiles:
    """The three launches of one backward pass."""

    rows: RowTiles
    key_value: AttentionTiles
    query: AttentionTiles


NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SMALL = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory a program
LARGE = ("sm_90", "sm_100")  # 227 KiB
CDNA = ("gfx90a", "gfx942")
RDNA = ("gfx1100",)

FORWARD = (
    Row(
        NVIDIA,
        "half",
        256,
        AttentionTiles(16, 32, 8, 2),
        "one token at a time or a few: 16 rows are the least that a matrix instruction takes; 64 keys in 4 warps spill",
        q_len=16,
    ),
    Row(
        CDNA,
        "half",
        256,
        AttentionTiles(16, 64, 4, 1),
        "one token at a time or a few: 16 rows are the least that a matrix instruction takes",
        q_len=16,
    ),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(64, 64, 4, 2),
        "short sequences: half of a tile of 128 rows would be padding",
        q_len=64,
    ),
    Row(
        ("sm_80", "sm_100", *SMALL),
        "half",
        128,
        AttentionTiles(64, 64, 8, 2),
        "short sequences; 192 to 255 registers, 83 KiB at most; in 4 warps the guarded loop spills, of 32 keys too",
        q_len=64,
    ),
    Row(
        LARGE,
        "half",
        64,
        AttentionTiles(128, 128, 8, 2),
        "two warpgroups of 64 rows each; 223 to 255 registers, and 7 instructions a score besides the tensor cores'; "
        "64 keys take 9",
    ),
    Row(("sm_100",), "half", 128, AttentionTiles(128, 64, 8, 2), "254 registers; 128 keys spill in the guarded loop"),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(128, 128, 8, 2, products=True, compiled_stride=True),
        "254 registers, 160 KiB; 7.9 instructions a score besides the tensor cores', of any stride 8.1; 64 keys 11",
    ),
    Row(("sm_90",), "half", 256, AttentionTiles(32, 64, 8, 2), "226 registers, 84 KiB; 64 rows spill where they guard"),
    Row(("sm_100",), "half", 256, AttentionTiles(32, 64, 8, 2), "228 registers, 84 KiB; of 64 rows 25 spill"),
    Row(("sm_80", *SMALL), "half", 64, AttentionTiles(128, 64, 8, 3), "228 registers, 48 KiB; in 4 warps they spill"),
    Row(
        ("sm_80",),
        "half",
        128,
        AttentionTiles(128, 64, 8, 3),
        "96 KiB; 2 stages spill 4. A window's code spills 18, none in a loop; 21 with products or 32 keys, 409 in 16 "
        "warps; 64 rows spill none, and take 29 instructions a score where these take 12",
        spills=True,
    ),
    Row(
        ("sm_86", "sm_89"),
        "half",
        128,
        AttentionTiles(128, 64, 8, 2, products=True, compiled_stride=True),
        "255 registers, 64 KiB; of a window spill 38 where addresses are no products, with 3 stages 10",
    ),
    Row(
        ("sm_120",),
        "half",
        128,
        AttentionTiles(128, 64, 8, 2, products=True, compiled_stride=True),
        "64 KiB; a window's code spills 35, 27 where addresses are no products, with 3 stages 53",
        spills=True,
    ),
    Row(("sm_80", *SMALL), "half", 256, AttentionTiles(32, 64, 8, 2), "248 registers, 84 KiB; 64 rows spill 18 to 76"),
    Row(CDNA, "half", 64, AttentionTiles(128, 64, 4, 1), "268 of 512 registers, 16 KiB"),
    Row(CDNA, "half", 128, AttentionTiles(128, 32, 4, 1), "280 of 512 registers; 64 keys take 374"),
    Row(CDNA, "half", 256, AttentionTiles(32, 32, 4, 1), "16 KiB; 64 rows spill up to 33, and 8 waves 15"),
    Row(RDNA, "half", 64, AttentionTiles(64, 32, 8, 1), "219 of 256 registers; 64 keys spill"),
    Row(RDNA, "half", 128, AttentionTiles(32, 16, 8, 1), "249 registers; 64 rows of 32 keys spill 3, 32 rows 73"),
    Row(RDNA, "half", 256, AttentionTiles(16, 16, 16, 1), "92 spill, in 8 warps 252; no tile is smaller", spills=True),
    Row(
        ("sm_80", "sm_86", "sm_89"),
        "ieee",
        64,
        AttentionTiles(32, 16, 4, 2),
        "152 registers on sm_80, 222 on the others; in 8 warps 6 and 18 spill",
    ),
    Row(("sm_90", "sm_100", "sm_120"), "ieee", 64, AttentionTiles(32, 32, 8, 2), "116 registers; in 4 warps spill 20"),
    Row(NVIDIA, "ieee", 128, AttentionTiles(16, 32, 8, 2), "32 rows of 16 keys spill up to 36"),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 16, 2), "in 8 warps 16 to 23 registers spill"),
    Row(CDNA, "ieee", 128, AttentionTiles(32, 32, 4, 1), "308 registers; matrix cores multiply float32 exactly"),
    Row(
        CDNA,
        "ieee",
        256,
        AttentionTiles(32, 16, 4, 1, products=True),
        "299 of 512 registers; of a window 1 spills on gfx90a where addresses are no products",
    ),
    Row(RDNA, "ieee", 128, AttentionTiles(16, 16, 16, 1), "no matrix cores for float32: 226 registers; 8 warps spill"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 289 spill, in 16 warps 226",
        spills=True,
    ),
    Row(("sm_80", *SMALL, *LARGE), "tf32", 64, AttentionTiles(128, 64, 8, 2), "255 registers on sm_90, 96 KiB"),
    Row(("sm_80", "sm_100", *SMALL), "tf32", 128, AttentionTiles(64, 32, 8, 2), "of 128 rows 4 to 79 registers spill"),
    Row(("sm_90",), "tf32", 128, AttentionTiles(64, 16, 8, 2), "of 32 keys 7 to 23 registers spill"),
    Row(("sm_80", *LARGE), "tf32", 256, AttentionTiles(32, 32, 8, 2), "254 registers; 64 rows spill on sm_90"),
    Row(SMALL, "tf32", 256, AttentionTiles(32, 16, 8, 2), "70 KiB; 32 keys do not fit"),
    Row(
        ("sm_80", "sm_86", "sm_89", *LARGE),
        "half",
        128,
        AttentionTiles(64, 64, 8, 2, products=True),
        "255 registers on sm_80; 6 spill where addresses are no products. On sm_120 spill 39, and 24",
        scores="rich",
    ),
    Row(NVIDIA, "half", 256, AttentionTiles(32, 32, 8, 2), "241 registers; 64 rows spill", scores="rich"),
    Row(CDNA, "half", 64, AttentionTiles(64, 64, 4, 1), "322 of 512 registers", scores="rich"),
    Row(CDNA, "half", 128, AttentionTiles(64, 32, 4, 1), "273 registers", scores="rich"),
    Row(CDNA, "half", 256, AttentionTiles(32, 16, 8, 1), "214 registers; 64 rows spill", scores="rich"),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 413 spill, in 16 warps 191",
        scores="rich",
        spills=True,
    ),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 8, 2), "196 registers; with one stage 261 spill", scores="rich"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "the smallest tile there is", scores="rich"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 548 spill",
        scores="rich",
        spills=True,
    ),
    Row(NVIDIA, "tf32", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich"),
)

# The forward's other choice, where a target has it; of 128 columns sm_120 spills. Off until a GPU has confirmed it:
# `python -m trilby.bench --device cuda` measures both, and says which to turn on. Warps that only load are no choice
# yet: the compiler (triton 3.9) breaks off on sm_100.
FORWARD_BY_DESCRIPTOR = (
    Row(
        ("sm_90",),
        "half",
        64,
        AttentionTiles(128, 128, 8, 2, descriptors=True),
        "205 registers; 6.9 instructions a score besides the tensor cores', by pointers 7.1",
    ),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(128, 128, 8, 2, descriptors=True),
        "248 registers, 161 KiB; 7.6 instructions a score, by pointers 7.9",
    ),
    Row(("sm_100",), "half", 64, AttentionTiles(128, 128, 8, 2, descriptors=True), "254 registers, 81 KiB"),
    Row(("sm_100",), "half", 128, AttentionTiles(128, 64, 8, 2, descriptors=True), "242 registers, 97 KiB"),
    Row(("sm_120",), "half", 64, AttentionTiles(128, 64, 8, 2, descriptors=True), "176 registers, 32 KiB"),
)

BACKWARD_KEY_VALUE = (
    Row(
        ("sm_90",),
        "half",
        64,
        AttentionTiles(64, 64, 4, 2, products=True),
        "252 registers, 2 programs at once; 10.3 instructions a score, 128 keys in 8 warps 10.2, which spill 2",
    ),
    Row(
        ("sm_80", "sm_100", *SMALL),
        "half",
        64,
        AttentionTiles(64, 128, 8, 2),
        "two accumulators of 128 keys: 238 to 255 registers",
    ),
    Row(("sm_100",), "half", 128, AttentionTiles(64, 128, 8, 2), "accumulators in tensor memory: 255 registers"),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(32, 128, 8, 2, products=True, prefetch_masked=False),
        "247 registers; 64 queries spill, masked tiles loaded ahead too. 19 instructions a score; 64 keys take 44",
    ),
    Row(("sm_80", *SMALL), "half", 128, AttentionTiles(64, 64, 8, 2), "181 registers, 72 KiB"),
    Row(LARGE, "half", 256, AttentionTiles(32, 32, 8, 2), "183 registers; 64 keys spill"),
    Row(
        ("sm_80", *SMALL),
        "half",
        256,
        AttentionTiles(16, 64, 8, 1, products=True),
        "250 registers on sm_86, where 9 spill if addresses are no products; 88 KiB: no room for 2 stages",
    ),
    Row(CDNA, "half", 64, AttentionTiles(32, 64, 4, 1), "232 registers"),
    Row(CDNA, "half", 128, AttentionTiles(16, 64, 4, 1), "190 registers; 8 waves load by 8 bytes, 32 queries spill"),
    Row(CDNA, "half", 256, AttentionTiles(16, 64, 8, 1), "234 registers"),
    Row(
        RDNA,
        "half",
        64,
        AttentionTiles(16, 16, 4, 1, products=True),
        "255 registers; 5 spill where addresses are no products, 32 keys 12; 8 warps load by 8 bytes",
    ),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 1068 spill, in 16 warps with products 882",
        spills=True,
    ),
    Row(NVIDIA, "ieee", 64, AttentionTiles(16, 32, 8, 2), "84 registers; in 4 warps 10 to 21 spill"),
    Row(NVIDIA, "ieee", 128, AttentionTiles(16, 16, 8, 2), "78 registers; with one stage 222 to 341 spill"),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 8, 2), "182 registers; with one stage 233 to 373 spill"),
    Row(CDNA, "ieee", 64, AttentionTiles(16, 32, 4, 1), "158 registers"),
    Row(CDNA, "ieee", 128, AttentionTiles(16, 32, 8, 1), "220 registers"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "4 waves may have 512 registers; 8 spill"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 812 spill, in 16 warps 706",
        spills=True,
    ),
    Row(NVIDIA, "tf32", 64, AttentionTiles(32, 64, 8, 2), "248 registers on sm_90, 80 KiB on sm_100"),
    Row(NVIDIA, "tf32", 128, AttentionTiles(16, 32, 8, 1), "140 registers, 56 KiB; 32 queries spill on sm_90"),
    Row(NVIDIA, "tf32", 256, AttentionTiles(16, 16, 8, 1), "32 keys take 114 KiB, which sm_86 has not"),
    Row(
        ("sm_80", "sm_86", "sm_89", *LARGE),
        "half",
        64,
        AttentionTiles(32, 32, 4, 2),
        "255 registers; 64 keys spill on sm_80",
        scores="rich",
    ),
    Row(
        ("sm_120",),
        "half",
        64,
        AttentionTiles(32, 32, 4, 2, products=True),
        "178 registers with dropout, of which 4 spill where addresses are no products",
        scores="rich",
    ),
    Row(
        ("sm_90",),
        "half",
        128,
        AttentionTiles(32, 32, 8, 2, products=True, prefetch_masked=False),
        "254 registers; without products 10 spill, with masked tiles loaded ahead 4",
        scores="rich",
    ),
    Row(("sm_80", "sm_100", *SMALL), "half", 128, AttentionTiles(32, 32, 8, 2), "255 registers", scores="rich"),
    Row(NVIDIA, "half", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich"),
    Row(CDNA, "half", 64, AttentionTiles(32, 64, 4, 1), "307 of 512 registers", scores="rich"),
    Row(CDNA, "half", 128, AttentionTiles(16, 64, 4, 1), "236 registers; 8 waves load by 8 bytes", scores="rich"),
    Row(CDNA, "half", 256, AttentionTiles(16, 32, 8, 1), "239 registers; 64 keys spill", scores="rich"),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 1062 spill",
        scores="rich",
        spills=True,
    ),
    Row(
        ("sm_80", "sm_120", *LARGE),
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 2),
        "198 registers; with one stage 533 spill",
        scores="rich",
    ),
    Row(
        ("sm_86", "sm_89"),
        "ieee",
        256,
        AttentionTiles(16, 16, 16, 2, products=True),
        "128 registers; with dropout alone 15 spill in 8 warps, and 11 where addresses are no products",
        scores="rich",
    ),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "the smallest tile there is", scores="rich"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 1285 spill",
        scores="rich",
        spills=True,
    ),
    Row(
        NVIDIA,
        "tf32",
        256,
        AttentionTiles(16, 16, 8, 1, products=True),
        "the smallest tile there is: 180 registers on sm_80, 80 KiB; 13 spill where addresses are no products",
        scores="rich",
    ),
)

BACKWARD_QUERY = (
    Row(
        ("sm_90",),
        "half",
        64,
        AttentionTiles(128, 128, 8, 2, products=True),
        "239 registers; 6.6 instructions a score, of 64 keys 8.0",
    ),
    Row(("sm_90", "sm_100"), "half", 128, AttentionTiles(128, 64, 8, 2), "250 registers, 145 KiB"),
    Row(("sm_80", *SMALL), "half", 64, AttentionTiles(128, 64, 8, 2), "249 registers, 48 KiB"),
    Row(("sm_80", *SMALL), "half", 128, AttentionTiles(64, 64, 8, 2), "224 registers, 72 KiB"),
    Row(("sm_90",), "half", 256, AttentionTiles(32, 64, 8, 2), "179 registers, 100 KiB; 64 queries spill 114"),
    Row(("sm_100",), "half", 256, AttentionTiles(64, 32, 8, 2), "247 registers; 64 keys spill"),
    Row(("sm_80", *SMALL), "half", 256, AttentionTiles(32, 32, 8, 2), "64 queries spill 8 to 16, with one stage"),
    Row(CDNA, "half", 64, AttentionTiles(64, 32, 4, 1), "197 registers"),
    Row(CDNA, "half", 128, AttentionTiles(64, 32, 4, 1), "329 of 512 registers; 8 waves spill 4 to 18"),
    Row(CDNA, "half", 256, AttentionTiles(64, 16, 8, 1), "252 registers"),
    Row(
        RDNA,
        "half",
        64,
        AttentionTiles(32, 16, 4, 1, products=True),
        "255 registers; 1 spills where addresses are no products, of 32 keys in 8 warps 15; 64 queries load by 8 bytes",
    ),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 1315 spill, in 16 warps 1248",
        spills=True,
    ),
    Row(
        ("sm_80", "sm_120", *LARGE),
        "ieee",
        64,
        AttentionTiles(64, 16, 8, 2),
        "128 registers on sm_80, 230 on sm_100, 64 KiB; as many warps resident as of 32 queries and 32 keys in 4 "
        "warps, which spill 6 to 12, and 4 % more instructions a score",
    ),
    Row(
        ("sm_86", "sm_89"),
        "ieee",
        64,
        AttentionTiles(32, 32, 4, 2),
        "38 KiB; 64 queries of 16 keys spill 10 on sm_86 and sm_89",
    ),
    Row(
        ("sm_90", "sm_100", "sm_120"),
        "ieee",
        128,
        AttentionTiles(16, 16, 8, 2),
        "80 registers, 49 KiB; with one stage 8 bytes spill",
    ),
    Row(
        ("sm_80", "sm_86", "sm_89"),
        "ieee",
        128,
        AttentionTiles(16, 16, 8, 1),
        "226 registers on sm_80, where 2 stages spill 10; 32 rows spill on sm_86",
    ),
    Row(
        ("sm_90", "sm_100", "sm_120"),
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 2),
        "148 registers; one stage spills 419",
    ),
    Row(
        ("sm_80", "sm_86", "sm_89"),
        "ieee",
        256,
        AttentionTiles(16, 16, 16, 2),
        "124 registers, 97 KiB; in 8 warps 39 spill",
    ),
    Row(CDNA, "ieee", 64, AttentionTiles(32, 32, 4, 1), "268 registers"),
    Row(CDNA, "ieee", 128, AttentionTiles(32, 16, 8, 1), "232 registers"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "4 waves may have 512 registers; 8 spill"),
    Row(
        RDNA,
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 872 spill, in 16 warps 727",
        spills=True,
    ),
    Row(SMALL, "tf32", 64, AttentionTiles(64, 32, 8, 2), "in 4 warps 16 to 22 registers spill"),
    Row(("sm_80", *LARGE), "tf32", 64, AttentionTiles(64, 32, 4, 2), "254 registers on sm_80, 72 KiB on sm_100"),
    Row(("sm_86", "sm_89"), "tf32", 128, AttentionTiles(64, 16, 8, 2), "206 registers, 88 KiB; 32 keys spill 16"),
    Row(("sm_80", "sm_120", *LARGE), "tf32", 128, AttentionTiles(32, 32, 8, 2), "172 registers on sm_80, 80 KiB"),
    Row(NVIDIA, "tf32", 256, AttentionTiles(32, 16, 8, 1), "252 registers on sm_80, 96 KiB"),
    Row(
        LARGE,
        "half",
        64,
        AttentionTiles(64, 64, 8, 2, products=True),
        "249 registers on sm_90, where 8 spill if addresses are no products; 32 keys spill 22 on sm_100",
        scores="rich",
    ),
    Row(
        ("sm_80", *SMALL),
        "half",
        64,
        AttentionTiles(64, 32, 8, 2),
        "255 registers on sm_80; 64 keys spill",
        scores="rich",
    ),
    Row(
        ("sm_120", *LARGE),
        "half",
        128,
        AttentionTiles(32, 32, 8, 2),
        "178 registers on sm_100; 64 queries spill, on sm_120 8",
        scores="rich",
    ),
    Row(
        ("sm_80", "sm_86", "sm_89"),
        "half",
        128,
        AttentionTiles(64, 32, 8, 2),
        "255 registers on sm_80, 56 KiB",
        scores="rich",
    ),
    Row(NVIDIA, "half", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich"),
    Row(CDNA, "half", 64, AttentionTiles(64, 32, 4, 1), "262 of 512 registers", scores="rich"),
    Row(CDNA, "half", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich"),
    Row(
        RDNA,
        "half",
        256,
        AttentionTiles(16, 16, 8, 1),
        "the smallest tile there is; 1626 spill",
        scores="rich",
        spills=True,
    ),
    Row(
        ("sm_80", "sm_120", *LARGE),
        "ieee",
        256,
        AttentionTiles(16, 16, 8, 2),
        "186 registers; with one stage 250 spill",
        scores="rich",
    ),
    Row(
        ("sm_86", "sm_89"),
        "ieee",
        256,
        AttentionTiles(16, 16, 16, 2, products=True),
        "108 registers, 98 KiB; in 8 warps 23 spill, and 4 with dropout where addresses are no products",
        scores="rich",
    ),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 4, 1), "the smallest tile there is", scores="rich"),
    Row(RDNA, "ieee", 256, AttentionTiles(16, 16, 8, 1), "the smallest tile there is", scores="rich", spills=True),
    Row(
        ("sm_80", "sm_90", "sm_120"),
        "tf32",
        256,
        AttentionTiles(16, 16, 8, 2),
        "224 registers on sm_80, 81 KiB; with one stage 8 spill on sm_90, 16 on sm_120",
        scores="rich",
    ),
    Row(
        ("sm_86", "sm_89", "sm_100"),
        "tf32",
        256,
        AttentionTiles(16, 16, 8, 1),
        "255 registers, 64 KiB; with 2 stages 6 spill on sm_100",
        scores="rich",
    ),
)
# Of a key head all rows are in one tile: a row serves as many as its tile has.
DECODE = (
    Row(NVIDIA, "half", 256, AttentionTiles(16, 32, 8, 2), "a token of a few heads", q_len=16, scores="any"),
    Row(
        ("sm_80", "sm_86", "sm_89", *LARGE),
        "half",
        128,
        AttentionTiles(64, 32, 8, 2, products=True),
        "a few tokens of many heads; 10 registers spill on sm_80 where addresses are no products",
        q_len=64,
        scores="any",
    ),
    Row(
        ("sm_120",),
        "half",
        128,
        AttentionTiles(64, 32, 8, 2, products=True),
        "a few tokens of many heads; rich scores spill 59, 57 where addresses are no products",
        q_len=64,
        scores="any",
        spills=True,
    ),
    Row(NVIDIA, "half", 256, AttentionTiles(32, 32, 8, 2), "64 rows spill", q_len=32, scores="any"),
    Row(CDNA, "half", 256, AttentionTiles(16, 32, 4, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(CDNA, "half", 128, AttentionTiles(64, 32, 4, 1), "a few tokens of many heads", q_len=64, scores="any"),
    Row(NVIDIA, "tf32", 256, AttentionTiles(16, 16, 8, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(NVIDIA, "ieee", 256, AttentionTiles(16, 16, 8, 2), "with one stage 249 spill", q_len=16, scores="any"),
    Row(CDNA, "ieee", 256, AttentionTiles(16, 16, 8, 1), "a token of a few heads", q_len=16, scores="any"),
    Row(RDNA, "half", 64, AttentionTiles(16, 16, 4, 1), "238 registers; 32 keys spill 2 to 9", q_len=16, scores="any"),
    Row(RDNA, "half", 256, AttentionTiles(16, 16, 8, 1), "16 warps spill 284", q_len=16, scores="any", spills=True),
    Row(RDNA, "ieee", 256, AttentionTiles(16, 16, 8, 1), "16 warps spill 508", q_len=16, scores="any", spills=True),
)
MOST_DECODED_QUERIES = 16
# As many as the merge holds at once; and fewer keys than this are over before a second kernel has started.
MOST_SPLITS = 64
FEWEST_SPLIT_KEYS = 256

# 32 rows of 128 half-precision elements are 32 bytes a thread from each input, two loads of 16.
BACKWARD_ROWS = RowTiles(32, 8)


TABLES = {"forward": FORWARD, "decode": DECODE, "key_value": BACKWARD_KEY_VALUE, "query": BACKWARD_QUERY}


def place_of(table: tuple[Row, ...], target: Target, row: Row) -> Place:
    """By what a row is known to `measured.py`."""
    name = next(name for name, each in TABLES.items() if each is table)
    return Place(name, target.name, row.arithmetic, row.head_dim, row.q_len, row.scores)


def attention_forward_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, q_len: int, is_plain: bool = True
) -> AttentionTiles:
    """The forward's launch parameters: for a target, arithmetic and head dimension at most 3 as lengths go."""
    return _first(FORWARD, target, _arithmetic(dtype, precision), head_dim, q_len, is_plain)


def attention_forward_by_descriptor_tiles(
    target: Target, dtype: torch.dtype, head_dim: int, precision: str = "ieee"
) -> AttentionTiles | None:
    """The forward's other launch parameters, which load by tensor descriptors; None: there are none."""
    row = _first_row(FORWARD_BY_DESCRIPTOR, target, _arithmetic(dtype, precision), head_dim, 0, True)
    return None if row is None else row.tiles


def attention_decode_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, q_len: int, group: int, kv_len: int
) -> DecodeTiles | None:
    """The decode kernel's launch parameters; None: the forward's kernel is the better.

    Splits depend on the keys alone, so that a sequence is computed the same way whatever else is in the batch.
    """
    if q_len > MOST_DECODED_QUERIES:
        return None
    try:
        tiles = _first(DECODE, target, _arithmetic(dtype, precision), head_dim, q_len * group, False)
    except LookupError:
        return None
    keys = max(FEWEST_SPLIT_KEYS, -(-kv_len // MOST_SPLITS))
    return DecodeTiles(tiles, -(-keys // tiles.block_n) * tiles.block_n)


def attention_backward_tiles(
    target: Target, precision: str, dtype: torch.dtype, head_dim: int, is_plain: bool = True
) -> BackwardTiles:
    """The backward's launch parameters, which do not depend on lengths."""
    arithmetic = _arithmetic(dtype, precision)
    return BackwardTiles(
        BACKWARD_ROWS,
        _first(BACKWARD_KEY_VALUE, target, arithmetic, head_dim, 0, is_plain),
        _first(BACKWARD_QUERY, target, arithmetic, head_dim, 0, is_plain),
    )


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "half"


def _first(
    table: tuple[Row, ...], target: Target, arithmetic: str, head_dim: int, q_len: int, is_plain: bool
) -> AttentionTiles:
    row = _first_row(table, target, arithmetic, head_dim, q_len, is_plain)
    if row is None:
        raise LookupError(f"no row for {target.name}, {arithmetic}, head dimension {head_dim}")
    numbers = measured_numbers(place_of(table, target, row))
    return row.tiles if numbers is None else replace(row.tiles, **dict[str, Any](numbers))


def _first_row(
    table: tuple[Row, ...], target: Target, arithmetic: str, head_dim: int, q_len: int, is_plain: bool
) -> Row | None:
    scores = ("any", "plain" if is_plain else "rich")
    for row in table:
        serves = target.name in row.targets and arithmetic == row.arithmetic and row.scores in scores
        if serves and head_dim <= row.head_dim and q_len <= row.q_len:
            return row
    return None
