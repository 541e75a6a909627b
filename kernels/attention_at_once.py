"""The common calls of attention at once: checked by the kernel alone, past what Python would make of their arguments.

Of tiny inputs the way to the kernel is what takes the time. Measured on one thread at (1, 1, 4, 8), in multiples of
what `F.scaled_dot_product_attention` takes: its checks in Python cost `attend` 2, `varlen_attn` 5; without them they
take 1.1 and 1.2, of which the operator is 0.8.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention_rules import KERNEL_DTYPES, LARGEST_HEAD_DIM
from .ops import NATIVE
from .options import NO_TENSORS, TENSORS, UNBOUNDED
from .shortcut import is_eager, short_way, wants_gradient

ALL_KEYS = (UNBOUNDED, UNBOUNDED)  # a window


def _of_packed_rows(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention` of query, key and value that are [rows, H, D], with its output so, too."""

    def call(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        packed = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        output, logsumexp = attention(*packed, *options)
        return output.squeeze(0).transpose(0, 1), logsumexp

    return call


attention = short_way("attention", tensors=3 + TENSORS)
_packed_attention = short_way("attention", tensors=3 + TENSORS, around=_of_packed_rows)
# Past the operator's `__call__`, which adds nothing. Unlike the short way, it is PyTorch's dispatcher in full.
attention_output = torch.ops.trilby.attention_output.default._op


def factor(query: Tensor, scale: float | None) -> float:
    """What scores are multiplied by."""
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def output_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    lower_right: bool | None,
    window_size: tuple[int, int],
) -> Tensor | None:
    """The output of a call, or None: for whoever checks the arguments to refuse it, or to find who computes it.

    Args:
        query: As `trilby::attention_output` takes it, as all that follows, but unchecked.
        key: Likewise.
        value: Likewise.
        mask: Likewise.
        query_starts: Likewise.
        key_starts: Likewise.
        scale: Likewise.
        enable_gqa: Likewise.
        lower_right: Likewise.
        window_size: Keys before and after its own that a query sees.
    """
    if not NATIVE.loaded or query.dtype not in KERNEL_DTYPES or not is_eager(query, key, value):
        return None
    output: Tensor
    try:
        if wants_gradient(query, key, value):
            return _differentiable_output(
                query, key, value, mask, query_starts, key_starts, scale, enable_gqa, lower_right, window_size
            )
        if mask is None or (mask.is_cpu and not mask.requires_grad):
            output = attention_output(
                query, key, value, mask, query_starts, key_starts, scale, enable_gqa, lower_right, *window_size
            )
            return output
    except RuntimeError:  # the kernel's
        pass
    return None


def _differentiable_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    lower_right: bool | None,
    window_size: tuple[int, int],
) -> Tensor | None:
    """Likewise, where somebody wants a gradient. The operator knows no defaults, and takes any size of heads."""
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if mask is not None or len(of_query) != len(of_key) or max(of_query[-1], of_value[-1]) > LARGEST_HEAD_DIM:
        return None
    numbers = factor(query, scale), bool(lower_right), *window_size, 0.0, 0.0
    output: Tensor
    if query_starts is not None:
        if len(of_query) != 3 or len(of_value) != 3 or (of_query[1] != of_key[1] and not enable_gqa):
            return None
        starts = None, None, None, query_starts, key_starts, None, None
        output = _packed_attention(query, key, value, *starts, *numbers, of_query[0])[0]
        return output
    if len(of_query) != 4 or (lower_right is None and window_size != ALL_KEYS and of_query[2] != of_key[2]):
        return None
    output = attention(query, key, value, *NO_TENSORS, *numbers, 0)[0]
    return output
