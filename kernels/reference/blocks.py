"""What the blocks of a GPT mean for the newest token of each sequence."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..options import AttentionOptions
from .attention import attention
from .gelu import gelu
from .linear import linear
from .norm import add_norm


def _attended(heads: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
    """Of a token's heads, [B, 3, H, D], keys and values go to `memory` [2, B, H, S, D]; the queries look at it."""
    B, _, H, D = heads.shape
    memory.transpose(0, 1)[torch.arange(B), :, :, lengths.long() - 1] = heads[:, 1:]
    options = AttentionOptions(key_lengths=lengths.to(torch.int32), scale=D**-0.5)
    output, _ = attention(heads[:, 0].unsqueeze(2), memory[0], memory[1], *options)
    return output.reshape(B, 1, H * D)


def decode_blocks(
    stream: Tensor,
    memory: Tensor,
    key_lengths: Tensor | None,
    length: int,
    eps: float,
    weights: Sequence[Tensor | None],
) -> Tensor:
    """Attention, then feed-forward, each after its norm and added to the stream, block by block; a norm at the end.

    Args:
        stream: [B, 1, C].
        memory: [blocks, 2, B, H, S, D]: keys and values; those of this token are written to its place.
        key_lengths: [B] int32: how many places of each sequence are taken, the token's own the last; none: `length`.
        length: The most of any sequence.
        eps: What the norms add to the variance.
        weights: As `DecoderWeights.operands` has them.

    Returns:
        [B, 1, C].
    """
    B, H, D = len(stream), memory.shape[3], memory.shape[5]
    lengths = torch.full((B,), length) if key_lengths is None else key_lengths
    parameters = iter(weights)
    branch = torch.zeros_like(stream)
    for of_block in memory:
        normalized, stream = _add_norm(stream, branch, parameters, eps)
        attended = _attended(_linear(normalized, parameters).view(B, 3, H, D), of_block, lengths)
        normalized, stream = _add_norm(stream, _linear(attended, parameters), parameters, eps)
        branch = _linear(gelu(_linear(normalized, parameters)), parameters)
    return _add_norm(stream, branch, parameters, eps)[0]


def _add_norm(stream: Tensor, branch: Tensor, parameters: Iterator[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias = islice(parameters, 2)
    return add_norm(stream, branch, weight, bias, None, 1, True, eps, 0.0)[:2]


def _linear(input: Tensor, parameters: Iterator[Tensor | None]) -> Tensor:
    weight, bias, scales = islice(parameters, 3)
    assert weight is not None
    return linear(input, weight, bias, scales)
