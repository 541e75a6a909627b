"""Attention on a GPU: check the tensors, choose the launch, allocate the results, run the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_backward import BackwardInputs, attention_backward_rows_call
from .attention_backward_key_value import attention_backward_key_value_call
from .attention_backward_query import attention_backward_query_call
from .attention_forward import attention_forward_call
from .attention_launch import AttentionTiles, attention_backward_tiles, attention_forward_tiles
from .targets import Target, device_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(query . key^T * scale) . value and the logarithm of the softmax's denominator.

    What `torch.ops.trilby.attention` means, computed in one pass over the keys. Half precision inputs multiply on
    tensor cores and accumulate in float32; float32 multiplies exactly, or in TF32 where
    `torch.backends.cuda.matmul` says so.

    Args:
        query: [B, H, T, D], D at most 256, float16, bfloat16 or float32, of any strides.
        key: [B, Hkv, S, D] with H a multiple of Hkv; query head h reads key head h // (H / Hkv).
        value: [B, Hkv, S, Dv], Dv at most 256.
        is_causal: Hide from query i every key after i (aligned to the top left, as in PyTorch)::

                S = 5
            T = 3   1 0 0 0 0
                    1 1 0 0 0
                    1 1 1 0 0

        scale: What scores are multiplied by.
        tiles: Launch parameters other than the table's.

    Returns:
        The output [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and logsumexp [B, H, T],
        float32, natural logarithm. A query that sees no key gets 0 and -inf.

    Raises:
        TypeError: The dtypes differ or are none of the three.
        ValueError: Shapes that do not fit, a head dimension over 256, or a device that has no kernel.
    """
    check_attention(query, key, value)
    B, H, T, D = query.shape
    output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
    logsumexp = query.new_empty(B, H, T, dtype=torch.float32)
    target = device_of(query, "query").target
    precision = dot_precision(target, query.dtype)
    tiles = tiles or attention_forward_tiles(target, precision, query.dtype, max(D, value.shape[-1]), T)
    attention_forward_call(query, key, value, output, logsumexp, is_causal, scale, tiles, precision).run(query.device)
    return output, logsumexp


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention`; the same inputs give the same bits on every run.

    Args:
        grad_output: [B, H, T, Dv] in query's dtype, of any strides.
        query: [B, H, T, D], as `attention` had it.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        output: [B, H, T, Dv], as `attention` returned it.
        logsumexp: [B, H, T] float32, as `attention` returned it.
        is_causal: As `attention` had it.
        scale: As `attention` had it.
        tiles: Launch parameters other than the tables'.

    Returns:
        grad_query [B, H, T, D], grad_key [B, Hkv, S, D] and grad_value [B, Hkv, S, Dv] in query's dtype, laid out in
        memory as (B, T, H, D) and so on.

    Raises:
        TypeError, ValueError: As `attention`; or grad_output, output or logsumexp are not as it returned them.
    """
    check_attention(query, key, value)
    check_results(grad_output, query, value, output, logsumexp)
    B, H, T, D = query.shape
    kv_heads, S, value_dim = value.shape[1:]
    target = device_of(query, "query").target
    grad_query = query.new_empty(B, T, H, D).transpose(1, 2)
    grad_key = key.new_empty(B, S, kv_heads, D).transpose(1, 2)
    grad_value = value.new_empty(B, S, kv_heads, value_dim).transpose(1, 2)
    exponent, delta = query.new_empty(2, B, H, T, dtype=torch.float32)
    precision = dot_precision(target, query.dtype)
    inputs = BackwardInputs(grad_output, query, key, value, exponent, delta, is_causal, scale, precision)
    launch = attention_backward_tiles(target, precision, query.dtype, max(D, value_dim))
    for call in (
        attention_backward_rows_call(grad_output, output, logsumexp.contiguous(), exponent, delta, launch.rows),
        attention_backward_key_value_call(inputs, grad_key, grad_value, tiles or launch.key_value),
        attention_backward_query_call(inputs, grad_query, tiles or launch.query),
    ):
        call.run(query.device)
    return grad_query, grad_key, grad_value


def check_results(grad_output: Tensor, query: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor) -> None:
    """Refuse results that are not of the shapes and dtypes that `attention` returns for these inputs.

    Raises:
        TypeError, ValueError: As `attention_backward` says.
    """
    shape = (*query.shape[:3], value.shape[-1])
    for name, tensor in (("grad_output", grad_output), ("output", output)):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query is {query.dtype}; they must be the same")
    if logsumexp.shape != shape[:3]:
        raise ValueError(f"logsumexp has shape {tuple(logsumexp.shape)}; it must be {tuple(shape[:3])}")
    if logsumexp.dtype != torch.float32:
        raise TypeError(f"logsumexp is {logsumexp.dtype}; it must be torch.float32")


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what the kernels would compute wrongly.

    Raises:
        TypeError, ValueError: As `attention` says.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; 4 dimensions (B, H, T, D) are needed")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; {', '.join(map(str, DTYPES))} are supported")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query is {query.dtype}; they must be the same")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query is on {query.device}")
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head dimension is {tensor.shape[-1]}; 1 to {MAX_HEAD_DIM} are supported")
    B, H, _, D = query.shape
    kv_heads, S = key.shape[1:3]
    if key.shape[0] != B or key.shape[-1] != D or (H % kv_heads if kv_heads else H):
        raise ValueError(
            f"key has shape {tuple(key.shape)}; with query {tuple(query.shape)} it must be ({B}, Hkv, S, {D}) "
            f"where Hkv divides {H}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must be ({B}, {kv_heads}, {S}, Dv), as key")


def dot_precision(target: Target, dtype: torch.dtype) -> str:
    """How float32 matrices multiply: "ieee", or "tf32" if PyTorch is set to it and the target is NVIDIA's.

    `torch.backends.cuda.matmul.fp32_precision` is the setting, and `torch.backends.fp32_precision` its default.
    """
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]  # torch's annotations lack it
    return "tf32" if dtype == torch.float32 and setting == "tf32" and target.backend == "cuda" else "ieee"
