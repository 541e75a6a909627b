"""Attention: check a call, choose who computes it, call them.

PyTorch's own function is the specification: whatever trilby has no faster kernel for runs it, with its errors.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _pytorch

from . import reference
from .attention_arguments import Arguments, checked_softcap, contiguous
from .ops import reasons_against_device
from .options import TENSORS, UNBOUNDED, AttentionOptions
from .seed import draw_seed
from .shortcut import reasons_of_context, short_way

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
# The C++ kernels hold up to 32 queries in their lanes, whether there are as many or not.
FEWEST_QUERIES = 32
# Fewer are decoded, by a kernel of their own, up to so many, and so many queries of all heads that share their keys
# (csrc/attention_plan.h has the same bounds).
MOST_DECODED, MOST_DECODED_ROWS = 4, 32
# Numbers in the keys, B·Hkv·S·D, below which such a call is over sooner in PyTorch. Measured on one thread, 12 heads of
# 64, the operator alone, PyTorch's time over trilby's in float32 (and in bfloat16): 0.77 (0.69) with 32 keys, 1.14
# (0.86) with 128; in batches of 8, 1.35 (1.19) with 1024.
FEWEST_CACHED = 2**20
# Multiplications for the scores, B·H·T·S·D, below which a call is over sooner in PyTorch. Measured on one thread,
# PyTorch's time over trilby's, in float32, forward (and with the backward): 0.95 (0.83) at 0.8 million and T = 32,
# 1.29 (1.06) at 3 million, 1.46 (1.26) at 6; in bfloat16 1.1 (5.7), 1.6 (4.7), 1.8 (8.7).
FEWEST_MULTIPLICATIONS = 2_000_000

_attention = short_way("attention", tensors=3 + TENSORS)


def reasons_for_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> tuple[str, ...]:
    """Every reason why a call of `scaled_dot_product_attention` is PyTorch's to compute; none: trilby computes it."""
    dtypes, devices = (query.dtype, key.dtype, value.dtype), (query.device, key.device, value.device)
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype, attn_mask.device, attn_mask.requires_grad)
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    arguments = (query.shape, key.shape, value.shape, dtypes, devices, mask, dropout_p, enable_gqa, trains)
    if torch.compiler.is_compiling():  # sizes are symbols there, and the answer a guard
        return tuple(_reasons(*arguments))
    return reasons_of_context() + _remembered_reasons(*arguments)


def reasons_for_kernel(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool = False) -> tuple[str, ...]:
    """Every reason why no kernel of trilby's can compute a call of `scaled_dot_product_attention`, of whatever size."""
    dtypes, devices = (query.dtype, key.dtype, value.dtype), (query.device, key.device, value.device)
    arguments = (query.shape, key.shape, value.shape, dtypes, devices, enable_gqa)
    return reasons_of_context() + tuple(_reasons_for_kernel(*arguments))


def _reasons(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    mask: tuple[torch.Size, torch.dtype, torch.device, bool] | None,
    dropout_p: float,
    enable_gqa: bool,
    trains: bool,
) -> Iterator[str]:
    if devices[0].type != "cpu" and mask is not None:
        yield "attn_mask is given"
    if devices[0].type != "cpu" and dropout_p != 0.0:
        yield f"dropout_p is {dropout_p}"
    if not 0.0 <= dropout_p <= 1.0:
        yield f"dropout_p is {dropout_p}, no probability"
    yield from _reasons_for_kernel(query, key, value, dtypes, devices, enable_gqa)
    if devices[0].type == "cpu" and len(query) == len(value) == 4:
        if query[2] <= MOST_DECODED and dropout_p == 0.0 and not trains:
            yield from _reasons_against_decoding(query[1] * query[2] // max(value[1], 1), key.numel())
        else:
            yield from _reasons_on_cpu(query[2], query.numel() * value[2])
        if mask is not None:
            yield from _reasons_of_mask((*query[:3], value[2]), dtypes[0], mask, dropout_p, trains)


def _reasons_for_kernel(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    enable_gqa: bool,
) -> Iterator[str]:
    if dtypes[0] not in KERNEL_DTYPES or not dtypes[0] == dtypes[1] == dtypes[2]:
        yield f"dtypes are {', '.join(map(str, dtypes))}, not all one of float32, bfloat16, float16"
    if not devices[0] == devices[1] == devices[2]:
        yield f"devices are {', '.join(map(str, devices))}, not one"
    yield from reasons_against_device(devices[0])
    if not len(query) == len(key) == len(value) == 4:
        yield "query, key and value are not all [B, H, T, D]"
        return
    B, H, T, D = query
    _, Hkv, S, Dv = value
    if key != (B, Hkv, S, D) or value[0] != B:
        yield "sizes of query, key and value do not agree, or must be broadcast"
    if Hkv != H and not (enable_gqa and Hkv > 0 and H % Hkv == 0):
        yield f"query has {H} heads and key {Hkv}"
    if max(D, Dv) > LARGEST_HEAD_DIM:
        yield f"the head dimension is {max(D, Dv)}, above {LARGEST_HEAD_DIM}"
    if min(B, H, T, S, D, Dv) == 0:
        yield "a size is zero"


def _reasons_against_decoding(rows: int, cached: int) -> Iterator[str]:
    if rows > MOST_DECODED_ROWS:
        yield f"there are {rows} queries to a key head, more than {MOST_DECODED_ROWS}"
    if cached < FEWEST_CACHED:
        yield f"the keys are {cached} numbers, fewer than {FEWEST_CACHED}"


def _reasons_on_cpu(T: int, multiplications: int) -> Iterator[str]:
    if T < FEWEST_QUERIES:
        yield f"there are {T} queries, fewer than {FEWEST_QUERIES}"
    if multiplications < FEWEST_MULTIPLICATIONS:
        yield f"the scores take {multiplications} multiplications, fewer than {FEWEST_MULTIPLICATIONS}"


def _reasons_of_mask(
    pairs: tuple[int, ...],
    dtype: torch.dtype,
    mask: tuple[torch.Size, torch.dtype, torch.device, bool],
    dropout_p: float,
    trains: bool,
) -> Iterator[str]:
    shape, mask_dtype, device, requires_grad = mask
    if requires_grad:
        yield "attn_mask requires a gradient, and trilby has none for it"
    if device.type != "cpu":
        yield f"attn_mask is on {device}"
    if mask_dtype not in (torch.bool, dtype):
        yield f"attn_mask is {mask_dtype}, neither torch.bool nor query's {dtype}"
    if len(shape) > 4 or any(size not in (1, pair) for size, pair in zip(shape[::-1], pairs[::-1])):
        yield f"attn_mask has shape {tuple(shape)}, which does not broadcast to {pairs}"
    # Measured on one thread, PyTorch's time over trilby's, forward (and with the backward), at (1, 12, 128, 64) and
    # (4, 12, 256, 64) with a mask of padding: in float32 0.97 (1.02) and 0.77 (0.96), in float16 1.13 (2.8) and 0.88
    # (1.7), in bfloat16 1.30 (2.9) and 1.13 (1.9). With one of documents, whose hidden blocks are skipped, 1.3 (1.3)
    # and 1.4 (1.8) in float32. With dropout 0.1, which PyTorch's kernel has not, 5.5 (2.5) and 11 (3.6).
    if dropout_p == 0.0 and (dtype == torch.float32 or (dtype == torch.float16 and not trains)):
        yield f"attn_mask is given in {dtype}{'' if trains else ' without gradients'}, and PyTorch may end sooner"


@lru_cache(4096)
def _remembered_reasons(*arguments: object) -> tuple[str, ...]:
    return tuple(_reasons(*arguments))  # type: ignore[arg-type]


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
        attn_mask: As PyTorch's, which computes it where that is as fast, or the mask requires a gradient.
        dropout_p: As PyTorch's. In trilby's kernels the mask follows from torch's generator (`torch.manual_seed`) and
            from the place of query and key, and takes no memory.
        is_causal: Hide from query i every key after i.
        scale: What scores are multiplied by; 1/√D by default.
        enable_gqa: Let H be a multiple of Hkv; query head h reads key head h // (H / Hkv).

    Returns:
        [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv).

    Raises:
        RuntimeError: Whatever PyTorch's function raises, for what PyTorch's function refuses.
    """
    # The cheapest question first.
    if key.dim() < 2 or (query.is_cpu and query.numel() * key.shape[-2] < min(FEWEST_MULTIPLICATIONS, FEWEST_CACHED)):
        return _pytorch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in (query, key, value)
        )
        if attn_mask is not None and attn_mask.dtype == torch.float32:
            attn_mask = attn_mask.to(dtype)
    contradictory = is_causal and attn_mask is not None
    if contradictory or reasons_for_pytorch(query, key, value, attn_mask, dropout_p, enable_gqa):
        return _pytorch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    options = AttentionOptions(
        mask=None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2]),
        seed=draw_seed(dropout_p, query.device),
        scale=scale,
        window_right=0 if is_causal else UNBOUNDED,
        dropout_p=dropout_p,
    )
    output: Tensor = _attention(query, key, value, *options)[0]
    return output


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    lower_right: bool | None = None,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` with all that PyTorch's has no argument for.

    A score goes through, in this order: scale, softcap, ALiBi, an additive mask. A query that sees no key gets 0. The
    causal mask and the window are aligned to the first query and key or, `lower_right`, to the last, as a cache of
    earlier keys wants it. For T = 2 queries and S = 4 keys, is_causal (1 = seen)::

        upper left   lower right
        1 0 0 0      1 1 1 0
        1 1 0 0      1 1 1 1

    Args:
        query: [B, H, T, D]; float32, bfloat16 or float16 for trilby's kernels.
        key: [B, Hkv, S, D]; query head h reads key head h // (H / Hkv).
        value: [B, Hkv, S, Dv].
        attn_mask: Broadcasts to [B, H, T, S]; bool (true is seen), or float32 or query's dtype, added to the scores. It
            has no gradient here: `scaled_dot_product_attention` gives one.
        dropout_p: The probability that a weight is dropped. The mask follows from torch's generator
            (`torch.manual_seed`) and from the place of query and key, and takes no memory.
        is_causal: Hide from a query every key after its own.
        scale: What scores are multiplied by; 1/√D by default.
        lower_right: Which corner is_causal, window_size and alibi_slopes count from. It must be said where the lengths
            differ: both conventions are in use, and one instead of the other is no error that anything would show.
        window_size: How many keys before and after its own a query sees; -1: all.
        softcap: Scores become softcap · tanh(score / softcap); 0: they do not.
        alibi_slopes: [H] or [B, H] float32: what a score loses for each step between query and key (Press, Smith and
            Lewis, "Train short, test long", 2022).
        key_lengths: [B] int32: how many of each batch's keys exist; all by default.
        block_table: [B, blocks] int32: batch b's keys lie, block after block, in the blocks block_table[b] of key
            [all blocks, Hkv, block size, D] and of value. It needs key_lengths, and has no gradients.
        return_logsumexp: Also return the logarithm of the softmax's denominator.

    Returns:
        [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and, if asked for, the logsumexp [B, H, T],
        float32, -inf where a query sees no key, without gradients.

    Raises:
        TypeError: A dtype that is not allowed.
        ValueError: Sizes that do not agree, or an alignment that is not said.
    """
    arguments = Arguments(query, key, value, key_lengths, block_table)
    arguments.check()
    if is_causal:
        window_size = (window_size[0], 0)
    positional = window_size != (UNBOUNDED, UNBOUNDED) or alibi_slopes is not None
    if positional and lower_right is None and (key_lengths is not None or query.shape[2] != key.shape[2]):
        raise ValueError(f"lower_right was not given, and query's length {query.shape[2]} may differ from the keys'")
    options = AttentionOptions(
        mask=arguments.expanded_mask(attn_mask),
        alibi_slopes=arguments.expanded_slopes(alibi_slopes),
        seed=draw_seed(dropout_p, query.device),
        key_lengths=contiguous(key_lengths),
        block_table=contiguous(block_table),
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        lower_right=bool(lower_right),
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=checked_softcap(softcap),
        dropout_p=dropout_p,
    )
    output, logsumexp = compute(query, key, value, options)
    return (output, logsumexp) if return_logsumexp else output


def compute(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of checked arguments: by a kernel, or where there is none by what the operator means."""
    if any(reasons_for_reference(query, key, value, options)):
        output, logsumexp = reference.attention(query, key, value, *options)
        return output, logsumexp.detach()
    results: tuple[Tensor, Tensor] = _attention(query, key, value, *options)
    return results


def reasons_for_reference(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Iterator[str]:
    """Every reason why no kernel computes a call of `attend` or `varlen_attn`; none: one does."""
    yield from reasons_of_context()
    yield from reasons_against_device(query.device)
    if query.dtype not in KERNEL_DTYPES:
        yield f"query's dtype is {query.dtype}, not float32, bfloat16 or float16"
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD_DIM:
        yield f"the head dimension is {max(query.shape[-1], value.shape[-1])}, above {LARGEST_HEAD_DIM}"
