"""The compile matrix: every kernel with every row of the launch tables, for every target, compiled without a GPU.

`python -m trilby.kernels.gpu matrix` compiles it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..options import AttentionOptions
from .attention_backward import BackwardInputs, attention_backward_rows_call
from .attention_backward_key_value import attention_backward_key_value_call
from .attention_backward_query import attention_backward_query_call
from .attention_decode import attention_decode_calls, attention_decode_parts
from .attention_forward import attention_forward_call
from .attention_inputs import AttentionInputs
from .attention_launch_backward import BACKWARD_KEY_VALUE, BACKWARD_QUERY, BACKWARD_ROWS
from .attention_launch_forward import DECODE, FORWARD, FORWARD_BY_DESCRIPTOR
from .attention_tiles import AttentionTiles, DecodeTiles, Row
from .call import Call
from .compile import Compilation
from .norm_backward import NormGradients, NormInputs, column_sums_call, norm_backward_calls
from .norm_forward import Dropout, NormResults, norm_forward_call
from .norm_launch import NORM_BACKWARD, NORM_FORWARD, NormRow, norm_backward_tiles, norm_forward_tiles
from .targets import Device, Target

# B, H, T of the calls that are compiled: no size but the head dimension and the width changes the code.
BATCH, HEADS, LENGTH = 2, 12, 1024
PROCESSORS = 132
PAGE_SIZE = 16
# Rows go by 16 bytes; the rest are their statistics and the seed, which all threads of a row load alike: 32 of 112
# bytes a thread at most.
NORM_WIDE_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch for one target, and what its machine code must be like.

    Attributes:
        name: Kernel, dtype, size and features, for people.
        target: What it is compiled for.
        call: The launch, of tensors on the meta device.
        multiplies: It must use matrix instructions.
        may_spill: Its row of the launch table says that it spills.
        least_wide_share: Of the bytes that its innermost loops move, those that must go by 16.
        least_descriptor_loads: Instructions that load a tile by a tensor descriptor.
    """

    name: str
    target: Target
    call: Call
    multiplies: bool = False
    may_spill: bool = False
    least_wide_share: float = 0.5
    least_descriptor_loads: int = 0

    def faults(self, compilation: Compilation) -> list[str]:
        """What is wrong with the machine code; nothing, if it is as it must be."""
        found = []
        if (compilation.spills or compilation.local_bytes) and not self.may_spill:
            found.append(f"{compilation.spills} spills, {compilation.local_bytes} bytes of local memory")
        if compilation.shared_bytes > self.target.shared_memory:
            found.append(f"{compilation.shared_bytes} bytes of shared memory, {self.target.shared_memory} allowed")
        if self.multiplies and (compilation.scalar_dots or not compilation.matrix_instructions):
            found.append(f"{compilation.scalar_dots} products without matrix instructions")
        if compilation.wide_share < self.least_wide_share:
            found.append(f"{compilation.wide_share:.0%} of the bytes by 16, {self.least_wide_share:.0%} are the least")
        if compilation.descriptor_loads < self.least_descriptor_loads:
            least = self.least_descriptor_loads
            found.append(f"{compilation.descriptor_loads} loads by tensor descriptors, {least} are the least")
        return found


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What of an attention call changes its code, beside the launch parameters."""

    dtype: torch.dtype
    head_dim: int
    is_causal: bool = True
    precision: str = "ieee"
    feature: str = ""  # of FEATURES

    def heads(self) -> torch.Tensor:
        """[B, H, T, D] in memory (B, T, H, D), as a projection leaves it."""
        return _meta(BATCH, LENGTH, HEADS, self.head_dim, dtype=self.dtype).transpose(1, 2)

    def forward(self, tiles: AttentionTiles) -> Call:
        """The forward launch."""
        return attention_forward_call(self._inputs(), self.heads(), self._statistics(), tiles)

    def decode(self, tiles: AttentionTiles) -> Call:
        """The launch that splits the keys."""
        return self._decode_calls(DecodeTiles(tiles, 512))[0]

    def merge(self) -> Call:
        """The launch that merges what the splits found."""
        return self._decode_calls(DecodeTiles(AttentionTiles(16, 64, 4, 1), 512))[1]

    def _decode_calls(self, tiles: DecodeTiles) -> tuple[Call, ...]:
        inputs, output = self._inputs(), self.heads()
        parts = attention_decode_parts(inputs, output, tiles)
        return attention_decode_calls(inputs, output, self._statistics(), parts, tiles)

    def key_value(self, tiles: AttentionTiles) -> Call:
        """The launch for the gradients of key and value."""
        return attention_backward_key_value_call(self._backward_inputs(), self.heads(), self.heads(), tiles)

    def query(self, tiles: AttentionTiles) -> Call:
        """The launch for the gradient of query."""
        return attention_backward_query_call(self._backward_inputs(), self.heads(), tiles)

    def rows(self) -> Call:
        """The launch for what the backward needs of each row."""
        return attention_backward_rows_call(self.heads(), self._statistics(), self._backward_inputs(), BACKWARD_ROWS)

    def _statistics(self) -> torch.Tensor:
        return _meta(BATCH, HEADS, LENGTH, dtype=torch.float32)

    def _inputs(self) -> AttentionInputs:
        options = AttentionOptions.plain(self.is_causal, 0.125)._replace(**FEATURES[self.feature](self.dtype))
        key = self.heads()
        if options.block_table is not None:
            key = _meta(LENGTH, PAGE_SIZE, HEADS, self.head_dim, dtype=self.dtype).transpose(1, 2)
        return AttentionInputs(self.heads(), key, key, options, self.precision)

    def _backward_inputs(self) -> BackwardInputs:
        return BackwardInputs(self._inputs(), self.heads(), self._statistics(), self._statistics())

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.dtype == torch.float32 else ""
        causal = " causal" if self.is_causal else ""
        return f"{_name(self.dtype)}{precision} D {self.head_dim}{causal}{' ' * bool(self.feature)}{self.feature}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int32)


def _mask(dtype: torch.dtype) -> dict[str, Any]:
    return {"mask": _meta(BATCH, HEADS, LENGTH, LENGTH, dtype=dtype)}


def _softcap(_: torch.dtype) -> dict[str, Any]:
    return {"softcap": 30.0}


def _slopes(_: torch.dtype) -> dict[str, Any]:
    return {"alibi_slopes": _meta(BATCH, HEADS, dtype=torch.float32)}


def _dropout(_: torch.dtype) -> dict[str, Any]:
    return {"seed": _meta(1, dtype=torch.int64), "dropout_p": 0.1}


# What a call may ask for that changes the code, by the name it has in the matrix: the options of a dtype.
FEATURES: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "": lambda _: {},
    "window": lambda _: {
        "window_left": 100,
        "lower_right": True,
        "query_starts": _integers(BATCH + 1),
        "key_starts": _integers(BATCH + 1),
        "longest_query": LENGTH,
    },
    "paged": lambda _: {"block_table": _integers(BATCH, 64), "key_lengths": _integers(BATCH)},
    "mask": lambda _: _mask(torch.bool),
    "bias": _mask,
    "softcap": _softcap,
    "slopes": _slopes,
    "dropout": _dropout,
    "everything": lambda dtype: _mask(dtype) | _softcap(dtype) | _slopes(dtype) | _dropout(dtype) | {"window_left": 99},
}
PLAIN = ("", "window")
RICH = ("dropout", "everything")
DECODED = ("", "paged", "everything")
KERNELS = (
    ("forward", FORWARD, PLAIN),
    ("decode", DECODE, DECODED),
    ("key_value", BACKWARD_KEY_VALUE, PLAIN),
    ("query", BACKWARD_QUERY, PLAIN),
)


def attention_cases(target: Target) -> Iterator[Case]:
    """Every row of the attention tables that serves `target`, at its largest head dimension, with what it serves."""
    for kernel, table, features in KERNELS:
        for row in table:
            if target.name not in row.targets:
                continue
            for feature in RICH if row.scores == "rich" else features:
                shape = dataclasses.replace(_shape(row), feature=feature)
                call = getattr(shape, kernel)(row.tiles)
                name = f"attention {kernel} {shape} {row.tiles.block_m}x{row.tiles.block_n}"
                least = least_wide_share(target, kernel, feature)
                yield Case(name, target, call, row.arithmetic != "ieee", target.name in row.spills, least)
    yield from _cases_by_descriptor(target)
    shape = AttentionShape(torch.bfloat16, 128)
    yield Case(f"attention rows {shape}", target, shape.rows())
    yield Case(f"attention merge {shape}", target, shape.merge())


def _cases_by_descriptor(target: Target) -> Iterator[Case]:
    """The forward's other choice: masked tiles and others have loops of their own, of keys and of values.

    What threads load themselves are the guarded tiles: of 16 keys of 64 numbers a thread of 8 warps has but 8 bytes.
    """
    for row in FORWARD_BY_DESCRIPTOR:
        for dtype in (torch.bfloat16, torch.float16):
            for feature in PLAIN if target.name in row.targets else ():
                shape = AttentionShape(dtype, row.head_dim, feature=feature)
                name = f"attention forward by descriptor {shape} {row.tiles.block_m}x{row.tiles.block_n}"
                call, may_spill = shape.forward(row.tiles), target.name in row.spills
                yield Case(name, target, call, True, may_spill, 0.0, least_descriptor_loads=4)


def least_wide_share(target: Target, kernel: str, feature: str) -> float:
    """What of an attention kernel's loops must go by 16 bytes: all tiles of queries, keys, values and their gradients.

    The rest comes a number at a time, in the layout of the products: a mask's elements, and in the gradients what is
    known of each row, of which AMD's lanes hold more rows (of 8 tiles' accesses there are 72 such).
    """
    if feature in ("mask", "bias", "everything"):
        return 0.0
    return 0.2 if target.backend == "hip" and kernel in ("key_value", "query") else 0.5


def _shape(row: Row) -> AttentionShape:
    if row.arithmetic == "half":
        return AttentionShape(torch.bfloat16, row.head_dim)
    return AttentionShape(torch.float32, row.head_dim, precision=row.arithmetic)


def norm_cases(target: Target) -> Iterator[Case]:
    """Every row of the norm tables and one wider, with everything that a norm can have, in bfloat16 and float32."""
    device = Device(target, PROCESSORS)
    for dtype in (torch.bfloat16, torch.float32):
        for row in (*NORM_FORWARD, None):
            width = 65536 if row is None else row.width
            inputs, results, dropout = _norm_tensors(width, dtype)
            for drop in (dropout, Dropout(None, 0.0)):
                tiles = norm_forward_tiles(device, width, drop.seed is not None)
                call = norm_forward_call(
                    inputs.summed, inputs.summed, (inputs.weight, inputs.weight), drop, 1e-5, results, tiles
                )
                dropped = " dropout" if drop.seed is not None else ""
                may_spill = _may_spill(row, target, dtype) and drop.seed is None
                name = f"norm forward {_name(dtype)} N {width}{dropped}"
                yield Case(name, target, call, False, may_spill, NORM_WIDE_SHARE)
        for row in (*NORM_BACKWARD, None):
            width = 65536 if row is None else row.width
            tiles = norm_backward_tiles(device, width)
            inputs, results, dropout = _norm_tensors(width, dtype)
            parts = _meta(PROCESSORS, width, dtype=torch.float32)
            gradients = NormGradients(results.normalized, results.normalized, parts, parts)
            for number, call in enumerate(norm_backward_calls(inputs, gradients, dropout, tiles)):
                name = f"norm backward {_name(dtype)} N {width} ({number})"
                yield Case(name, target, call, False, _may_spill(row, target, dtype), NORM_WIDE_SHARE)
        parts, total = _meta(2, PROCESSORS, 1024, dtype=torch.float32), _meta(1024, dtype=dtype)
        yield Case(f"column sums {_name(dtype)}", target, column_sums_call(parts, total, total))


def _may_spill(row: NormRow | None, target: Target, dtype: torch.dtype) -> bool:
    return row is not None and target.name in row.spills and dtype == torch.float32


def _norm_tensors(width: int, dtype: torch.dtype) -> tuple[NormInputs, NormResults, Dropout]:
    rows, statistics = _meta(LENGTH, width, dtype=dtype), _meta(LENGTH, dtype=torch.float32)
    return (
        NormInputs(rows, rows, rows, statistics, statistics, _meta(width, dtype=dtype)),
        NormResults(rows, rows, statistics, statistics),
        Dropout(_meta(1, dtype=torch.int64), 0.1),
    )


def cases(target: Target) -> Iterator[Case]:
    """The whole matrix for one target."""
    yield from attention_cases(target)
    yield from norm_cases(target)
