"""The blocks of a GPT for the token that is generated, as one call: check it, choose who computes it, call them.

Alone with its weights a token waits for memory, and every call from Python on top: the interpreter's code and objects
have left the caches when the next layer's turn comes, for the weights have passed through. Measured on one thread, a
token of GPT-2 in float32, bfloat16 and int8: the linear layers alone 41, 20.5 and 10.1 ms; with all else called layer
by layer 46, 25.5 and 15.7; by one call 41, 22 and 11.9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .attention_rules import LARGEST_HEAD_DIM
from .linear import KERNEL_DTYPES, MOST_ROWS, QuantizedWeight
from .ops import reasons_against_device
from .shortcut import is_ordinary, reasons_of_context, short_way

_decode_blocks = short_way("decode_blocks", tensors=3)


class Affine(NamedTuple):
    """What a layer multiplies with, and adds."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The weights as they lie in memory."""
        return self.weight.values if isinstance(self.weight, QuantizedWeight) else self.weight

    @property
    def scales(self) -> Tensor | None:
        """Those of quantized weights."""
        return self.weight.scales if isinstance(self.weight, QuantizedWeight) else None


class BlockWeights(NamedTuple):
    """The parameters of a pre-norm block of width C, in the order of the operator.

    Attributes:
        norm_1: Of the norm before attention: [C] each.
        attention_in: The projection to queries, keys and values, [3·C, C].
        attention_out: The projection of what the heads found, [C, C].
        norm_2: Of the norm before the feed-forward layer: [C] each.
        expand: [hidden, C].
        contract: [C, hidden].
    """

    norm_1: Affine
    attention_in: Affine
    attention_out: Affine
    norm_2: Affine
    expand: Affine
    contract: Affine

    def check(self, number: int, C: int, dtype: torch.dtype) -> None:
        """ValueError unless all have the sizes that go with the width C, and `dtype`."""
        hidden = len(self.expand.values)
        sizes = ((C,), (3 * C, C), (C, C), (C,), (hidden, C), (C, hidden))
        for name, affine, wanted in zip(self._fields, self, sizes):
            weight, bias = list(affine.values.shape), affine.bias
            if weight != list(wanted) or (bias is not None and list(bias.shape) != weight[:1]):
                beside = "" if bias is None else f", its bias {list(bias.shape)}"
                raise ValueError(
                    f"{name} of block {number} is {weight}{beside}; it must be {list(wanted)}, [{wanted[0]}]"
                )
            given = {tensor.dtype for tensor in (affine.weight, bias) if isinstance(tensor, Tensor)}
            if given - {dtype}:
                raise ValueError(f"{name} of block {number} has {given}; the last norm has {dtype}")


@dataclass(frozen=True)
class DecoderWeights:
    """The parameters of a GPT's blocks and of the norm after the last, checked once for many calls.

    Raises:
        ValueError: Sizes, dtypes or devices that do not agree.
    """

    blocks: tuple[BlockWeights, ...]
    last_norm: Affine
    operands: list[Tensor | None] = field(init=False, repr=False)  # as the operator takes them
    most_rows: int = field(init=False)  # sequences above which one of the products is another kernel's to compute
    _reasons: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for number, block in enumerate(self.blocks):
            block.check(number, self.width, self.dtype)
        object.__setattr__(self, "operands", list(self._operands()))
        devices = {tensor.device for tensor in self.operands if tensor is not None}
        if len(devices) != 1:
            raise ValueError(f"the weights are on {', '.join(map(str, devices))}; they must be on one device")
        most = min((MOST_ROWS.get(affine.values.dtype, 0) for block in self.blocks for affine in block), default=0)
        object.__setattr__(self, "most_rows", most)
        object.__setattr__(self, "_reasons", tuple(self._reasons_of_weights()))

    @property
    def width(self) -> int:
        """C."""
        return self.last_norm.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.last_norm.values.dtype

    def reasons_for_reference(self, rows: int) -> tuple[str, ...]:
        """Every reason why no kernel computes the blocks for `rows` sequences here and now; none: one does.

        Called one by one, the layers are the faster then.
        """
        reasons = self._reasons + reasons_of_context()
        if not 0 < rows <= self.most_rows:
            reasons += (f"stream has {rows} rows, not 1 to {self.most_rows}",)
        if torch.is_autocast_enabled("cpu"):
            reasons += ("autocast chooses the dtype",)
        return reasons

    def _operands(self) -> Iterator[Tensor | None]:
        for block in self.blocks:
            for name, affine in zip(block._fields, block):
                yield from (affine.values, affine.bias)
                if not name.startswith("norm"):
                    yield affine.scales
        yield from (self.last_norm.values, self.last_norm.bias)

    def _reasons_of_weights(self) -> Iterator[str]:
        device = self.last_norm.values.device
        if device.type != "cpu":
            yield f"trilby has no kernel for {device.type}"
        else:
            yield from reasons_against_device(device)
        if self.dtype not in KERNEL_DTYPES:
            yield f"the dtype is {self.dtype}, not float32, bfloat16 or float16"
        if not is_ordinary(*self.operands):
            yield "a weight is no plain tensor"
        if any(tensor is not None and tensor.stride(-1) != 1 for tensor in self.operands):
            yield "the elements of a row of weights, or of a bias, are apart"


def decode_blocks(
    stream: Tensor,
    weights: DecoderWeights,
    memory: Tensor,
    length: int,
    key_lengths: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The blocks of a GPT, and the norm after the last, for the newest token of each sequence.

    The layers are those of GPT-2, and compute what `add_layer_norm`, `linear`, `attend` and `gelu` compute::

        stream + branch ─┬─ norm_1 ─ attention ─(+)─┬─ norm_2 ─ expand ─ GELU (tanh) ─ contract ── branch
                         └──────────────────────────┘───────────────────────────────────────────── stream

    Args:
        stream: [B, 1, C], float32, bfloat16 or float16: what the token is embedded as.
        weights: Those of norms and all biases in the dtype of stream, others in that or quantized.
        memory: [blocks, 2, B, H, S, C / H] in the dtype of stream: for each block the keys, and the values, of H heads
            in S places. The new ones are written to the last place that is taken.
        length: How many places are taken then, 1 to S; with key_lengths the most of any sequence.
        key_lengths: [B] int32: how many places of each sequence are taken then; none: `length` in all.
        eps: What the norms add to the variance.

    Returns:
        [B, 1, C], normalized: what a decoder turns into logits.

    Raises:
        ValueError: Sizes or dtypes that do not agree, or gradients are asked for: there are none.
    """
    _check(stream, weights, memory, length, key_lengths)
    by_kernel = memory.shape[-1] <= LARGEST_HEAD_DIM and memory.stride(-1) == 1
    if not by_kernel or weights.reasons_for_reference(len(stream)):
        return reference.decode_blocks(stream, memory, key_lengths, length, eps, weights.operands)
    output: Tensor = _decode_blocks(stream, memory, key_lengths, length, eps, weights.operands)
    return output


def _check(stream: Tensor, weights: DecoderWeights, memory: Tensor, length: int, key_lengths: Tensor | None) -> None:
    B, C, blocks = len(stream), weights.width, len(weights.blocks)
    if stream.shape != (B, 1, C):
        raise ValueError(f"stream is {list(stream.shape)}; with these weights it must be [B, 1, {C}]")
    if memory.dim() != 6 or memory.shape[:3] != (blocks, 2, B) or memory.shape[3] * memory.shape[5] != C:
        wanted = f"[{blocks}, 2, {B}, H, S, D] with H · D = {C}"
        raise ValueError(f"memory is {list(memory.shape)}; it must be {wanted}")
    if not 1 <= length <= memory.shape[4]:
        raise ValueError(f"length is {length}; memory has room for 1 to {memory.shape[4]}")
    if not stream.dtype == memory.dtype == weights.dtype:
        raise ValueError(f"stream is {stream.dtype}, memory {memory.dtype}, weights {weights.dtype}; they must be one")
    if key_lengths is not None and (key_lengths.shape != (B,) or key_lengths.dtype != torch.int32):
        raise ValueError(f"key_lengths is {list(key_lengths.shape)} {key_lengths.dtype}; it must be [{B}] torch.int32")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (stream, *weights.operands)):
        raise ValueError("stream or weights want a gradient, and what writes into memory has none; use torch.no_grad()")
