"""What the attention kernels refuse: everything that they would compute wrongly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import AttentionOptions

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def check_attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> None:
    """Refuse inputs that do not fit together.

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
    batches = B if options.block_table is None else key.shape[0]
    if key.shape[0] != batches or key.shape[-1] != D or (H % kv_heads if kv_heads else H):
        raise ValueError(
            f"key has shape {tuple(key.shape)}; with query {tuple(query.shape)} it must be ({batches}, Hkv, S, {D}) "
            f"where Hkv divides {H}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {tuple(value.shape)}; it must be ({batches}, {kv_heads}, {S}, Dv), as key")
    _check_sequences(query, options)
    _check_score(query, key, options)


def _check_sequences(query: Tensor, options: AttentionOptions) -> None:
    count = query.shape[0]
    if options.query_starts is not None:
        count = options.query_starts.shape[0] - 1
        _check_tensor("query_starts", options.query_starts, torch.int32, (count + 1,), query)
        if query.shape[0] != 1 or count < 0:
            raise ValueError(f"query has shape {tuple(query.shape)}; with query_starts [N + 1] it must be (1, H, T, D)")
        if options.key_starts is None and options.block_table is None:
            raise ValueError("query_starts is given without key_starts or block_table")
        if options.longest_query < 1 and query.shape[2]:
            raise ValueError(f"longest_query is {options.longest_query}; packed queries need at least 1")
    if options.key_starts is not None:
        if options.query_starts is None or options.block_table is not None:
            raise ValueError("key_starts is given without query_starts, or with block_table")
        _check_tensor("key_starts", options.key_starts, torch.int32, (count + 1,), query)
    if options.key_lengths is not None:
        _check_tensor("key_lengths", options.key_lengths, torch.int32, (count,), query)
    if options.block_table is not None:
        blocks = options.block_table.shape[-1]
        _check_tensor("block_table", options.block_table, torch.int32, (count, blocks), query)
        if options.key_lengths is None:
            raise ValueError("block_table is given without key_lengths")
    if options.alibi_slopes is not None:
        _check_tensor("alibi_slopes", options.alibi_slopes, torch.float32, (count, query.shape[1]), query)
    for name in ("query_starts", "key_starts", "key_lengths"):
        tensor = getattr(options, name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has stride {tensor.stride()}; it must be contiguous")


def _check_score(query: Tensor, key: Tensor, options: AttentionOptions) -> None:
    if options.mask is not None:
        if options.query_starts is not None or options.block_table is not None:
            raise ValueError("mask is given with query_starts or block_table; packed or paged keys have no mask")
        if options.mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(f"mask is {options.mask.dtype}; it must be torch.bool, torch.float32 or {query.dtype}")
        shape = (*query.shape[:3], key.shape[2])
        _check_tensor("mask", options.mask, options.mask.dtype, shape, query)
    if options.seed is not None:
        _check_tensor("seed", options.seed, torch.int64, (1,), query)
    elif options.dropout_p > 0:
        raise ValueError(f"dropout_p is {options.dropout_p} and seed is None; dropout needs a seed")
    if not 0 <= options.dropout_p <= 1:
        raise ValueError(f"dropout_p is {options.dropout_p}; it must be from 0 to 1")
    if not options.softcap >= 0:
        raise ValueError(f"softcap is {options.softcap}; it must be 0 (none) or more")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], query: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} and query is on {query.device}")


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
