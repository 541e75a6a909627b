"""How attention's kernels are cut, what a row of a launch table is, and the groups of targets that rows name."""

from __future__ import annotations

from dataclasses import dataclass


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
        spills: Targets where the compiler runs out of registers, for want of a tile that is smaller or of one as fast.
    """

    targets: tuple[str, ...]
    arithmetic: str
    head_dim: int
    tiles: AttentionTiles
    reason: str
    q_len: int = 2**31
    scores: str = "plain"
    spills: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackwardTiles:
    """The three launches of one backward pass."""

    rows: RowTiles
    key_value: AttentionTiles
    query: AttentionTiles


NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SMALL = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory a program
BUT_HOPPER = ("sm_80", "sm_100", *SMALL)  # which has rows of its own
LARGE = ("sm_90", "sm_100")  # 227 KiB
CDNA = ("gfx90a", "gfx942")
RDNA = ("gfx1100",)
