"""Attention: check a call, choose who computes it, call them.

PyTorch's own function is the specification: whatever trilby has no faster kernel for runs it, with its errors.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _pytorch

from .ops import NATIVE

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256


def reasons_for_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Iterator[str]:
    """Every reason why a call of `scaled_dot_product_attention` is PyTorch's to compute; none: trilby computes it."""
    if attn_mask is not None:
        yield "attn_mask is given"
    if dropout_p != 0.0:
        yield f"dropout_p is {dropout_p}"
    if not query.dim() == key.dim() == value.dim() == 4:
        yield "query, key and value are not all [B, H, T, D]"
        return
    if query.dtype not in KERNEL_DTYPES or not query.dtype == key.dtype == value.dtype:
        yield f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}, not all one of float32, bfloat16, float16"
    if query.device != key.device or query.device != value.device:
        yield "query, key and value are on different devices"
    if query.device.type == "cpu" and not NATIVE.loaded:
        yield NATIVE.reason
    if query.device.type not in ("cpu", "cuda"):
        yield f"trilby has no kernel for {query.device.type}"
    B, H, T, D = query.shape
    _, Hkv, S, Dv = value.shape
    if key.shape != (B, Hkv, S, D) or value.shape[0] != B:
        yield "sizes of query, key and value do not agree, or must be broadcast"
    if Hkv != H and not (enable_gqa and Hkv > 0 and H % Hkv == 0):
        yield f"query has {H} heads and key {Hkv}"
    if max(D, Dv) > LARGEST_HEAD_DIM:
        yield f"the head dimension is {max(D, Dv)}, above {LARGEST_HEAD_DIM}"
    if min(B, H, T, S, D, Dv) == 0:
        yield "a size is zero"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query · keyᵀ · scale) · value, never holding the scores: `F.scaled_dot_product_attention`, faster.

    Arguments, results, errors and gradients are those of `torch.nn.functional.scaled_dot_product_attention`. The causal
    mask is aligned to the top left, so for T = 3 queries and S = 5 keys (1 = seen)::

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0

    Args:
        query: [B, H, T, D], float32, bfloat16 or float16 for trilby's kernels, with any strides.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        attn_mask: As PyTorch's; such calls are PyTorch's to compute.
        dropout_p: As PyTorch's; above 0 such calls are PyTorch's to compute.
        is_causal: Hide from query i every key after i.
        scale: What scores are multiplied by; 1/√D by default.
        enable_gqa: Let H be a multiple of Hkv; query head h reads key head h // (H / Hkv).

    Returns:
        [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv).

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in (query, key, value)
        )
    for _ in reasons_for_pytorch(query, key, value, attn_mask, dropout_p, enable_gqa):
        return _pytorch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    output: Tensor = torch.ops.trilby.attention(query, key, value, is_causal, scale)[0]
    return output
