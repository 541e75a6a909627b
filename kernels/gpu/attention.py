"""Attention on a GPU: check the tensors, choose the launch, allocate the results, run the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import AttentionOptions
from .attention_backward import BackwardInputs, attention_backward_rows_call
from .attention_backward_key_value import attention_backward_key_value_call
from .attention_backward_query import attention_backward_query_call
from .attention_check import check_attention, check_results
from .attention_decode import attention_decode_calls, attention_decode_parts
from .attention_forward import attention_forward_call
from .attention_inputs import AttentionInputs
from .attention_launch import (
    attention_backward_tiles,
    attention_decode_tiles,
    attention_forward_tiles,
)
from .attention_tiles import AttentionTiles, DecodeTiles
from .repeat import Work, perform
from .targets import Target, device_of


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *options: Any,
    tiles: AttentionTiles | DecodeTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(score(query . key^T)) . value and the logarithm of the softmax's denominator.

    What `torch.ops.trilby.attention` means, computed in one pass over the keys. Half precision inputs multiply on
    tensor cores and accumulate in float32; float32 multiplies exactly, or in TF32 where
    `torch.backends.cuda.matmul` says so.

    Args:
        query: [B, H, T, D], D at most 256, float16, bfloat16 or float32, of any strides.
        key: [B, Hkv, S, D] with H a multiple of Hkv; query head h reads key head h // (H / Hkv).
        value: [B, Hkv, S, Dv], Dv at most 256.
        options: The rest of the operator's arguments, in its order, as `AttentionOptions` says and draws.
        tiles: Launch parameters other than the table's; `DecodeTiles` choose the kernel that splits the keys.

    Returns:
        The output [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and logsumexp [B, H, T],
        float32, natural logarithm. A query that sees no key gets 0 and -inf.

    Raises:
        TypeError: A tensor has a dtype that it may not have.
        ValueError: Shapes that do not fit, a head dimension over 256, or a device that has no kernel.
    """
    asked = AttentionOptions(*options)
    numbers = (*asked.numbers, _float32_setting(query.dtype), tiles)
    output, logsumexp = perform(_attention, (query, key, value, *asked.tensors), numbers)
    return output, logsumexp


def _attention(tensors: Sequence[Any], numbers: Sequence[Any]) -> Work:
    inputs, target, tiles = _inputs(tensors, numbers)
    query, value = inputs.query, inputs.value
    B, H, T, _ = query.shape
    output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
    logsumexp = query.new_empty(B, H, T, dtype=torch.float32)
    tiles = tiles or attention_tiles(target, inputs)
    parts: tuple[Tensor, ...] = ()
    if isinstance(tiles, DecodeTiles):
        parts = attention_decode_parts(inputs, output, tiles)
        calls = attention_decode_calls(inputs, output, logsumexp, parts, tiles)
    else:
        calls = (attention_forward_call(inputs, output, logsumexp, tiles),)
    fills: list[tuple[Tensor, float]] = []
    if inputs.options.query_starts is not None:  # rows of no sequence
        fills = [(output, 0.0), (logsumexp, -torch.inf), *zip(parts, (0.0, -torch.inf))]
    return Work((output, logsumexp), calls, parts, tuple(fills))


def _inputs(tensors: Sequence[Any], numbers: Sequence[Any]) -> tuple[AttentionInputs, Target, Any]:
    """What a call reads, checked; where it runs; and the launch parameters that it was given, if any."""
    query, key, value, *of_options = tensors
    *others, _setting, tiles = numbers  # the setting is there to tell calls apart: `dot_precision` asks for it
    options = AttentionOptions(*of_options, *others)
    check_attention(query, key, value, options)
    target = device_of(query, "query").target
    return AttentionInputs(query, key, value, options, dot_precision(target, query.dtype)), target, tiles


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *options: Any,
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
        options: As `attention` had them; keys in blocks have no gradients.
        tiles: Launch parameters other than the tables'.

    Returns:
        grad_query [B, H, T, D], grad_key [B, Hkv, S, D] and grad_value [B, Hkv, S, Dv] in query's dtype, laid out in
        memory as (B, T, H, D) and so on.

    Raises:
        TypeError, ValueError: As `attention`; or grad_output, output or logsumexp are not as it returned them; or
            block_table is given.
    """
    asked = AttentionOptions(*options)
    tensors = (query, key, value, *asked.tensors, grad_output, output, logsumexp)
    numbers = (*asked.numbers, _float32_setting(query.dtype), tiles)
    grad_query, grad_key, grad_value = perform(_attention_backward, tensors, numbers)
    return grad_query, grad_key, grad_value


def _attention_backward(tensors: Sequence[Any], numbers: Sequence[Any]) -> Work:
    *of_forward, grad_output, output, logsumexp = tensors
    forward, target, tiles = _inputs(of_forward, numbers)
    query, key, value = forward.query, forward.key, forward.value
    check_results(grad_output, query, value, output, logsumexp)
    if forward.options.block_table is not None:
        raise ValueError("block_table is given; keys in blocks have no gradients")
    B, H, T, D = query.shape
    kv_heads, S, value_dim = value.shape[1:]
    grad_query = query.new_empty(B, T, H, D).transpose(1, 2)
    grad_key = key.new_empty(B, S, kv_heads, D).transpose(1, 2)
    grad_value = value.new_empty(B, S, kv_heads, value_dim).transpose(1, 2)
    exponent, delta = (query.new_empty(B, H, T, dtype=torch.float32) for _ in range(2))
    inputs = BackwardInputs(forward, grad_output, exponent, delta)
    launch = attention_backward_tiles(target, forward.precision, query.dtype, forward.head_dim, forward.is_plain)
    calls = (
        attention_backward_rows_call(output, logsumexp.contiguous(), inputs, launch.rows),
        attention_backward_key_value_call(inputs, grad_key, grad_value, tiles or launch.key_value),
        attention_backward_query_call(inputs, grad_query, tiles or launch.query),
    )
    gradients = (grad_query, grad_key, grad_value)
    fills: tuple[tuple[Tensor, float], ...] = ()
    if forward.options.query_starts is not None:  # rows of no sequence
        fills = tuple((gradient, 0.0) for gradient in gradients)
    return Work(gradients, calls, (exponent, delta), fills)


def attention_tiles(target: Target, inputs: AttentionInputs) -> AttentionTiles | DecodeTiles:
    """The launch parameters of the kernel that serves a call."""
    call = (target, inputs.precision, inputs.query.dtype, inputs.head_dim, inputs.longest_query)
    return attention_decode_tiles(*call, inputs.group, inputs.longest_key) or attention_forward_tiles(
        *call, inputs.is_plain
    )


def dot_precision(target: Target, dtype: torch.dtype) -> str:
    """How float32 matrices multiply: "ieee", or "tf32" if PyTorch is set to it and the target is NVIDIA's."""
    return "tf32" if _float32_setting(dtype) == "tf32" and target.backend == "cuda" else "ieee"


def _float32_setting(dtype: torch.dtype) -> str:
    """What `torch.backends.cuda.matmul.fp32_precision`, or its default, says of products of `dtype`."""
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]  # torch's annotations lack it
    return str(setting)
