"""Who computes a call of attention: every reason why it is PyTorch's, from sizes, dtypes and devices alone.

`scaled_dot_product_attention`, trilby in PyTorch's place, `explain` and transformers' interface all ask here, and the
kernels in PyTorch's place (csrc/bindings_provider.cpp) go by the same limits.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import reasons_against_device

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
# The C++ kernels hold up to 32 queries in their lanes, whether there are as many or not.
FEWEST_QUERIES = 32
# Fewer are decoded, by a kernel of their own, up to so many, and so many queries of all heads that share their keys
# (csrc/attention_plan.h has the same bounds). Measured on one thread, 12 heads of 64 and 1024 keys, PyTorch's time over
# trilby's in float32 (bfloat16, float16), for 4, 8, 12 and 16 queries: 1.28 (1.56, 1.75), 1.06 (1.27, 1.30), 0.90
# (1.46, 1.09), 0.99 (1.33, 0.97); by the kernel of many queries, 8 take twice PyTorch's time.
MOST_DECODED, MOST_DECODED_ROWS = 8, 32
# Multiplications for the scores, B·H·T·S·D, below which such a call is over sooner in PyTorch, up to FEW_DECODED
# queries; four times as many above. Measured likewise, of one query, the operator alone, at (B, H, S) = (1, 2, 1024),
# (1, 12, 256), (8, 12, 256), (1, 12, 8192), that is 0.1, 0.2, 1.6 and 6.3 million: 1.05 (0.83, 2.0), 1.09 (1.0, 2.9),
# 1.5 (1.2, 3.0), 1.2 (1.1, 2.8); of two at 0.3, 0.4, 3.1 and 12.6 million: 0.78 (1.2, 1.5), 0.94 (1.4, 1.7), 1.2
# (1.9, 2.2), 1.3 (1.9, 2.2); of eight at (1, 12, 256), (1, 12, 1024) and (8, 12, 1024), 1.6, 6.3 and 50 million: 0.87
# (1.07, 1.20), 1.06 (1.27, 1.30), 1.37 (1.42, 1.45).
FEWEST_DECODED = {torch.float32: 2**20, torch.bfloat16: 2**19, torch.float16: 2**17}
SMALLEST_DECODED = min(FEWEST_DECODED.values())
FEW_DECODED = 4
# Multiplications for the scores, B·H·T·S·D, below which a call is over sooner in PyTorch. Measured on one thread,
# PyTorch's time over trilby's, in float32, forward (and with the backward): 0.95 (0.83) at 0.8 million and T = 32,
# 1.29 (1.06) at 3 million, 1.46 (1.26) at 6; in bfloat16 1.1 (5.7), 1.6 (4.7), 1.8 (8.7).
# With dropout no call is too small: 1.5 (1.3) at B·H·T·D = 1·4·16·32 in float32 and 1.7 (1.5) in bfloat16, 5 (2.4) at
# 2·4·64·32, 8 (3.7) at 2·6·256·64.
FEWEST_MULTIPLICATIONS = 2_000_000
# Training in float32, the autograd node being Python's, gains nothing of short sequences, however many there are:
# measured likewise with the backward at T = 32 and D = 64 (256), B·H = 12 and 48: 0.91 (0.76), 0.95 (0.80); at T = 64:
# 1.06 (0.97), 1.02 (1.07); at T = 128: 1.35 (1.29), 1.32 (1.58).
FEWEST_TRAINED = {torch.float32: 64, torch.bfloat16: 32, torch.float16: 32}
# Without gradients and mask the kernel is asked at once (kernels/attention_at_once.py), and few multiplications are no
# reason. Measured likewise in float32 by `python -m trilby.bench.sweep`, at B·H = 1, 2, 12, 48, of as many keys: T = 32
# and D = 16 (and 64, 256): 1.14 1.08 1.21 1.33 (1.01 1.04 1.09 1.06, 0.95 0.86 0.95 0.92); T = 64: 1.25 1.40 1.78 1.69
# (1.31 1.36 1.29 1.41, 1.36 1.34 1.21 1.14); T = 16: 0.95 0.96 1.21 1.15 (0.88 0.83 0.83 0.77, 0.7); and what is
# left to PyTorch in this way takes 0.75 at 10 µs. Of T = 4: 0.94 0.96 0.96 1.02 (0.96 0.99 1.23 1.35), T = 8: 0.91
# 0.88 1.19 1.15 (1.04 1.01 1.13 1.32); of D = 256,
# 0.76 to 1.03. One query to 16, 128, 1024 and 8192 keys: 0.82 to 1.10.
FEWEST_AT_ONCE, FEWEST_AT_ONCE_OF_WIDE, WIDE = 32, 64, 128
# One query of bfloat16 to 1024 keys is over sooner in PyTorch: 0.83. So are few queries of one or two heads, if it is
# below so many multiplications: on AVX2 0.77 to 0.89 to few keys (up to FEW_KEYS), 0.74 and 0.77 of one query to 128.
DECODED_AT_ONCE = (torch.float32, torch.float16)
FEW_HEADS, FEWEST_OF_FEW_HEADS = 2, 2**17
# In PyTorch's place, C++ throughout, no call without a mask is too small, and few queries to few keys are taken, too:
# the fewest queries to so many keys, and to more. Where a gradient may be wanted one side computes both directions:
# PyTorch's backward with trilby's logsumexp was seen to err 3 times as much as with its own, at scores of 10^5. So
# training has limits of its own, and none below those of inference, by which a compiled forward goes. Measured
# likewise, 12 heads of 16 (and 64), T queries and keys, at T = 4, 8, 16, 24, 40: in float32 1.4 1.6 1.4 2.2 2.1 (1.2
# 1.2 1.0 1.7 1.3), with the backward 1.1 1.2 1.1 1.4 1.3 (0.9 0.9 0.9 1.1 0.9); in bfloat16 1.7 2.0 1.5 2.4 2.5 (1.2
# 1.4 1.1 1.9 1.4), with it 1.3 1.5 1.9 7.7 8.9 (1.2 1.5 5.4 5.1 5.7). Of 16 queries to 128 keys in float32 0.9 (0.7),
# with it 0.8 (0.8); in bfloat16 1.1 (0.9), 4.6 (2.4). A call that is handed on: 0.9, with the backward 0.95.
FEW_KEYS = 32
FEWEST_IN_PLACE = {
    "in inference": (4, 32),
    "in training": (24, 32),
    "in inference and half precision": (4, 9),
    "in training and half precision": (8, 9),
}
# With a mask, in float32. Measured likewise, at 13 (and 67, 805) million: a mask of padding 1.07 (1.18, 1.13), with the
# backward 0.99 (1.10, 1.22); causal and of padding 1.19 (1.31, 1.33), 1.13 (1.28, 1.48); of documents 1.4 (1.9, 2.2),
# 1.4 (1.9, 2.5); numbers to be added that hide nothing 1.06 (0.96, 0.83), 0.98 (0.92, 0.92), so those are PyTorch's. In
# float16 the same gain 1.35 (1.35, 1.24), 1.48 (1.47, 1.60), 1.8 (2.2, 2.7), 1.25 (1.06, 1.01), and 1.2 to 4 with the
# backward, in bfloat16 1.2 to 1.8, and 1.6 to 3 with it.
FEWEST_MASKED_MULTIPLICATIONS = 10_000_000


class Mask(NamedTuple):
    """What a mask is, without its numbers.

    Attributes:
        shape: It broadcasts to [B, H, T, S].
        dtype: torch.bool (true is seen), or that of the numbers that are added.
        device: Where it is.
        is_differentiated: Whether somebody wants its gradient.
        hides: Whether it may hide pairs, whose blocks are skipped.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_differentiated: bool = False
    hides: bool = True

    @classmethod
    def of(cls, mask: Tensor) -> "Mask":
        """That of a tensor."""
        return cls(mask.shape, mask.dtype, mask.device, mask.requires_grad and torch.is_grad_enabled(), hides(mask))


class AttentionCall(NamedTuple):
    """All that decides who computes a call of `scaled_dot_product_attention`.

    Attributes:
        query: The size, [B, H, T, D] for trilby's kernels.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        dtypes: Of query, key and value.
        devices: Likewise.
        mask: The mask, if there is one.
        dropout_p: As the function's.
        is_causal: As the function's.
        enable_gqa: As the function's.
        trains: Whether somebody wants a gradient; of a call in PyTorch's place, whether somebody might: it is the
            backward, or gradients are enabled.
        in_place: Whether it is a call of PyTorch's own operator of flash attention, trilby being in its place.
    """

    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    mask: Mask | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    trains: bool = False
    in_place: bool = False


def hides(mask: Tensor) -> bool:
    """Whether `mask` may hide pairs, as far as it matters: of numbers in float32 a corner of a batch must show it.

    A causal mask hides the last key from the first query, one of padding the first or the last key from the last query.
    Only numbers that are at hand are looked at.
    """
    if mask.dtype != torch.float32 or not mask.is_cpu:
        return True
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.dim() < 2 or mask.numel() == 0:
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    corners = torch.stack([mask.detach()[..., i, j] for i, j in ((0, -1), (-1, 0), (-1, -1))])
    return bool(corners.isneginf().any())


def reasons_for_pytorch(call: AttentionCall) -> tuple[str, ...]:
    """Every reason why a call is PyTorch's to compute; none: trilby computes it."""
    if torch.compiler.is_compiling():  # sizes are symbols there, and the answer a guard
        return tuple(_reasons(call))
    return _remembered_reasons(call)


def is_pytorchs_at_sight(query: Tensor, key: Tensor, has_mask: bool) -> bool:
    """Whether a call without dropout is PyTorch's, by what can be asked the soonest: not every such call is.

    Asking all that decides was a third of the time of a call that takes PyTorch 10 µs, and was then handed on.
    """
    of_query, of_key = query.shape, key.shape
    if not query.is_cpu or len(of_query) != 4 or len(of_key) != 4:
        return False
    B, H, T, D = of_query
    S = of_key[2]
    multiplications = B * H * T * S * D
    trains = query.requires_grad and torch.is_grad_enabled()
    if T <= MOST_DECODED and not trains:
        is_known = has_mask or B * H <= FEW_HEADS or D > WIDE or (T > 1 and S > FEW_KEYS)
        return is_known and multiplications < SMALLEST_DECODED
    if min(FEWEST_QUERIES, FEWEST_AT_ONCE) > T:
        return True
    if has_mask and query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return multiplications < FEWEST_MASKED_MULTIPLICATIONS
    return (has_mask or trains) and multiplications < FEWEST_MULTIPLICATIONS


@lru_cache(4096)
def is_trilbys_inference(
    query: torch.Size, key: torch.Size, value: torch.Size, dtypes: tuple[torch.dtype, ...], enable_gqa: bool
) -> bool:
    """Whether trilby computes a call on a CPU without mask, dropout and gradients; soonest, since not why."""
    devices = (torch.device("cpu"),) * 3
    return not any(_reasons(AttentionCall(query, key, value, dtypes, devices, enable_gqa=enable_gqa)))


@lru_cache(4096)
def _remembered_reasons(call: AttentionCall) -> tuple[str, ...]:
    return tuple(_reasons(call))


def _reasons(call: AttentionCall) -> Iterator[str]:
    device, dtype, mask, dropout_p = call.devices[0], call.dtypes[0], call.mask, call.dropout_p
    if mask is not None and call.is_causal:
        yield "attn_mask and is_causal are both given"
    if not 0.0 <= dropout_p <= 1.0:
        yield f"dropout_p is {dropout_p}, no probability"
    yield from _reasons_against_kernel(call)
    if device.type != "cpu":
        if mask is not None:
            yield "attn_mask is given"
        if dropout_p != 0.0:
            yield f"dropout_p is {dropout_p}"
        return
    if len(call.query) != 4 or len(call.value) != 4:
        return
    if mask is not None:
        yield from map(str, errors_of_mask(mask, (*call.query[:3], call.value[2]), dtype, device))
    if dropout_p == 0.0:
        yield from _reasons_of_size(call)


def _reasons_against_kernel(call: AttentionCall) -> Iterator[str]:
    """Every reason why no kernel of trilby's can compute a call, of whatever size."""
    dtypes, devices = call.dtypes, call.devices
    if dtypes[0] not in KERNEL_DTYPES or not dtypes[0] == dtypes[1] == dtypes[2]:
        yield f"dtypes are {', '.join(map(str, dtypes))}, not all one of float32, bfloat16, float16"
    if not devices[0] == devices[1] == devices[2]:
        yield f"devices are {', '.join(map(str, devices))}, not one"
    yield from reasons_against_device(devices[0])
    if not len(call.query) == len(call.key) == len(call.value) == 4:
        yield "query, key and value are not all [B, H, T, D]"
        return
    B, H, T, D = call.query
    _, Hkv, S, Dv = call.value
    if call.key != (B, Hkv, S, D) or call.value[0] != B:
        yield "sizes of query, key and value do not agree, or must be broadcast"
    if Hkv != H and not (call.enable_gqa and Hkv > 0 and H % Hkv == 0):
        yield f"query has {H} heads and key {Hkv}"
    if max(D, Dv) > LARGEST_HEAD_DIM:
        yield f"the head dimension is {max(D, Dv)}, above {LARGEST_HEAD_DIM}"
    if min(B, H, T, S, D, Dv) == 0:
        yield "a size is zero"


def fewest_decoded(dtype: torch.dtype, T: int) -> int:
    """Multiplications for the scores of T queries, MOST_DECODED at most, from which on decoding is faster here."""
    return FEWEST_DECODED.get(dtype, FEWEST_DECODED[torch.float32]) * (1 if T <= FEW_DECODED else 4)


def _reasons_of_size(call: AttentionCall) -> Iterator[str]:
    """Why a call on a CPU, without dropout, may be over sooner in PyTorch."""
    B, H, T, D = call.query
    Hkv, S = call.value[1:3]
    multiplications = B * H * T * S * D
    if call.in_place and call.mask is None and (S <= FEW_KEYS or T > MOST_DECODED or call.trains):
        occasion = "in training" if call.trains else "in inference"
        if call.dtypes[0] in (torch.bfloat16, torch.float16):
            occasion += " and half precision"
        fewest = FEWEST_IN_PLACE[occasion][S > FEW_KEYS]
        if fewest > T:
            yield f"there are {T} queries, fewer than {fewest}, {occasion}"
        return
    if call.mask is None and not call.trains and not call.in_place:
        if T > MOST_DECODED:
            fewest = FEWEST_AT_ONCE if D <= WIDE else FEWEST_AT_ONCE_OF_WIDE
            if fewest > T:
                yield f"there are {T} queries, fewer than {fewest}"
            return
        is_at_once = S <= FEW_KEYS or (T == 1 and call.dtypes[0] in DECODED_AT_ONCE)
        is_tiny = B * H <= FEW_HEADS and multiplications < FEWEST_OF_FEW_HEADS
        if is_at_once and not is_tiny and D <= WIDE and MOST_DECODED_ROWS * Hkv >= H * T:
            return
    if T <= MOST_DECODED and not call.trains:
        rows, fewest = H * T // max(Hkv, 1), fewest_decoded(call.dtypes[0], T)
        if rows > MOST_DECODED_ROWS:
            yield f"there are {rows} queries to a key head, more than {MOST_DECODED_ROWS}"
        if multiplications < fewest:
            yield f"the scores take {multiplications} multiplications, fewer than {fewest}"
        return
    fewest = FEWEST_TRAINED.get(call.dtypes[0], FEWEST_QUERIES) if call.trains and not call.in_place else FEWEST_QUERIES
    if fewest > T:
        yield f"there are {T} queries, fewer than {fewest}"
    if multiplications < FEWEST_MULTIPLICATIONS:
        yield f"the scores take {multiplications} multiplications, fewer than {FEWEST_MULTIPLICATIONS}"
    if call.mask is not None and call.dtypes[0] == torch.float32:
        if multiplications < FEWEST_MASKED_MULTIPLICATIONS:
            yield f"masked scores take {multiplications} multiplications, fewer than {FEWEST_MASKED_MULTIPLICATIONS}"
        if not call.mask.hides:
            yield "attn_mask is added in float32, and no corner of it hides a pair"


def reasons_against_heads(query: Tensor, heads: int) -> Iterator[str]:
    """Why no kernel of trilby's can compute attention of query [B, T, H · D] to itself."""
    B, T, C = query.shape
    size = torch.Size((B, heads, T, C // heads))
    yield from _reasons_against_kernel(AttentionCall(size, size, size, (query.dtype,) * 3, (query.device,) * 3))


def errors_of_mask(
    mask: Mask, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[TypeError | ValueError]:
    """What keeps trilby's kernels from masking the scores [B, H, T, S] of a query of `dtype` with `mask`."""
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        yield TypeError(f"attn_mask is {mask.dtype}; torch.bool, torch.float32 or query's {dtype} is needed")
    if mask.is_differentiated:
        yield ValueError("attn_mask requires a gradient, and trilby's kernels have none for it")
    if mask.device != device:
        yield ValueError(f"attn_mask is on {mask.device}, and query on {device}")
    if len(mask.shape) > 4 or any(given not in (1, wanted) for given, wanted in zip(mask.shape[::-1], size[::-1])):
        yield ValueError(f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to {tuple(size)}")
