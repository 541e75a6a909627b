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


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    T, S = query.shape[2], key.shape[2]
    if key_lengths is None and T in (1, S):
        return F.scaled_dot_product_attention(query, key, value, is_causal=T > 1)
    places = torch.arange(S, device=key.device)
    last = places[S - T :, None] if key_lengths is None else (key_lengths[:, None] + places[:T] - T)[:, None, :, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=places <= last)


@dataclass(frozen=True)
class Layers:
    """Functions with these signatures and meanings:

    - `attention(query, key, value, *, dropout_p, is_causal)`: `F.scaled_dot_product_attention`.
    - `layer_norm(input, normalized_shape, weight, bias, eps)`: `F.layer_norm`.
    - `add_layer_norm(stream, branch, normalized_shape, weight, bias, eps, dropout_p)` returns
      `(normalized, summed)`, where `summed = stream + dropout(branch)` and `normalized = layer_norm(summed)`.
    - `linear(input, weight, bias)`: `F.linear`.
    - `cached_attention(query, key, value, key_lengths)`: the last T of S tokens, (B, H, T, D), look at themselves and
      at what came before, (B, H, S, D). With `key_lengths`, (B), only so many keys of each sequence exist, and the
      queries are the last T of those. T = 2, S = 5; in a sequence of 5 and one of 4 (1 = seen)::

          1 1 1 1 0          1 1 1 0 0
          1 1 1 1 1          1 1 1 1 0
    """  # noqa: D415

    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    linear: Callable[..., Tensor] = F.linear
    cached_attention: Callable[..., Tensor] = _cached_attention


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
)

PYTORCH = Layers(
    attention=F.scaled_dot_product_attention,
    layer_norm=F.layer_norm,
    add_layer_norm=_dropout_add_and_norm,
)
