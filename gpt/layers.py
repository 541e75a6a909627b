"""The functions that a GPT repeats, as one choice: trilby's kernels, or PyTorch's own for comparison.

The model calls them through `Layers` and knows nothing else about them, so the same model, from the same seed, can be
trained with either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from trilby import kernels

from .loss import linear_cross_entropy


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    T, S = query.shape[2], key.shape[2]
    if key_lengths is None and T in (1, S):
        return F.scaled_dot_product_attention(query, key, value, is_causal=T > 1)
    places = torch.arange(S, device=key.device)
    last = places[S - T :, None] if key_lengths is None else (key_lengths[:, None] + places[:T] - T)[:, None, :, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=places <= last)


def _decoding_attention(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    if key_lengths is None and query.shape[2] == key.shape[2]:
        return kernels.scaled_dot_product_attention(query, key, value, is_causal=True)
    output = kernels.attend(query, key, value, is_causal=True, lower_right=True, key_lengths=key_lengths)
    assert isinstance(output, Tensor), "the logsumexp was not asked for"
    return output


def _linear(input: Tensor, weight: Tensor | kernels.QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    dense = weight.dequantized(input.dtype) if isinstance(weight, kernels.QuantizedWeight) else weight
    return F.linear(input, dense, bias)


def sequence_of(places: Tensor, starts: Tensor) -> Tensor:
    """The number of the sequence that each of `places` is in, given where they begin, `starts` (N + 1)."""
    return torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout_p: float
) -> Tensor:
    places = torch.arange(query.shape[2], device=query.device)
    sequence = sequence_of(places, starts)
    seen = (sequence[:, None] == sequence) & (places[:, None] >= places)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout_p)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout_p: float
) -> Tensor:
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))  # (T, H, D) each
    output = kernels.varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), dropout_p=dropout_p)
    assert isinstance(output, Tensor), "the logsumexp was not asked for"
    return output.transpose(0, 1).unsqueeze(0)


def _cross_entropy_of_all_logits(input: Tensor, weight: Tensor, target: Tensor, count: int | None = None) -> Tensor:
    total = F.cross_entropy(F.linear(input, weight), target, reduction="mean" if count is None else "sum")
    return total if count is None else total / count


@dataclass(frozen=True)
class Layers:
    """Functions with these signatures and meanings:

    - `attention(query, key, value, *, dropout_p, is_causal)`: `F.scaled_dot_product_attention`.
    - `layer_norm(input, normalized_shape, weight, bias, eps)`: `F.layer_norm`.
    - `add_layer_norm(stream, branch, normalized_shape, weight, bias, eps, dropout_p)` returns
      `(normalized, summed)`, where `summed = stream + dropout(branch)` and `normalized = layer_norm(summed)`.
    - `gelu(input, approximate="tanh")`: `F.gelu`.
    - `linear(input, weight, bias)`: `F.linear`; `weight` may be a `kernels.QuantizedWeight`.
    - `cached_attention(query, key, value, key_lengths)`: the last T of S tokens, (B, H, T, D), look at themselves and
      at what came before, (B, H, S, D). With `key_lengths`, (B), only so many keys of each sequence exist, and the
      queries are the last T of those. T = 2, S = 5; in a sequence of 5 and one of 4 (1 = seen)::

          1 1 1 1 0          1 1 1 0 0
          1 1 1 1 1          1 1 1 1 0

    - `decode_blocks(stream, weights, memory, length, key_lengths, eps)`: `kernels.decode_blocks`; None: the layers
      above are called one by one.
    - `packed_attention(query, key, value, starts, longest, dropout_p)`: a row of sequences, (1, H, T, D), each of which
      looks at itself as in `attention`. `starts`, (N + 1) int32, is where they begin, and T; none is longer than
      `longest`. Sequences of 2 and 3 (1 = seen)::

          1 . . . .
          1 1 . . .
          . . 1 . .
          . . 1 1 .
          . . 1 1 1

    - `linear_cross_entropy(input, weight, target, count)`: see `loss.linear_cross_entropy`.
    """  # noqa: D415

    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    gelu: Callable[..., Tensor] = F.gelu
    linear: Callable[..., Tensor] = _linear
    cached_attention: Callable[..., Tensor] = _cached_attention
    decode_blocks: Callable[..., Tensor] | None = None
    packed_attention: Callable[..., Tensor] = _packed_attention
    linear_cross_entropy: Callable[..., Tensor] = _cross_entropy_of_all_logits


def _dropout_add_and_norm(
    stream: Tensor,
    branch: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    if dropout_p > 0:
        branch = F.dropout(branch, dropout_p)
    summed = stream + branch
    return F.layer_norm(summed, normalized_shape, weight, bias, eps), summed


TRILBY = Layers(
    attention=kernels.scaled_dot_product_attention,
    layer_norm=kernels.layer_norm,
    add_layer_norm=kernels.add_layer_norm,
    gelu=kernels.gelu,
    linear=kernels.linear,
    cached_attention=_decoding_attention,
    decode_blocks=kernels.decode_blocks,
    packed_attention=_varlen_attention,
    linear_cross_entropy=linear_cross_entropy,
)

PYTORCH = Layers(
    attention=F.scaled_dot_product_attention,
    layer_norm=F.layer_norm,
    add_layer_norm=_dropout_add_and_norm,
)
