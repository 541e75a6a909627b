"""What attention means, with everything that it may be asked for, and its gradients."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import AttentionOptions
from .dtypes import computed
from .random import attention_dropout_factors


@dataclass(frozen=True)
class _Sequence:
    """Sequences of one length, and where they lie: of query, output and gradients, `tensor[batch, :, queries]`.

    Attributes:
        batch: Which of query's batches: one, or all of them.
        queries: Which rows of query.
        keys: Where in key, `key[batch, :, keys]`; none where they were gathered from blocks.
        key: [b, Hkv, S, D], as they are.
        value: [b, Hkv, S, Dv].
        mask: [b, H, T, S], bool or to be added.
        alibi_slopes: [b, H].
    """

    batch: slice
    queries: slice
    keys: slice | None
    key: Tensor
    value: Tensor
    mask: Tensor | None
    alibi_slopes: Tensor | None


def _sequences(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Iterator[_Sequence]:
    """What attends to itself: all batches at once where they are alike, else each sequence in turn."""
    mask, slopes, _, query_starts, key_starts, key_lengths, block_table, *_ = options
    B, _, T, _ = query.shape
    if query_starts is None and key_lengths is None:
        every = slice(0, B)
        yield _Sequence(every, slice(0, T), slice(0, key.shape[2]), key, value, mask, slopes)
        return
    for n in range(B if query_starts is None else query_starts.numel() - 1):
        one = slice(n, n + 1)
        batch, queries = (one, slice(0, T)) if query_starts is None else (slice(0, 1), _piece(query_starts, n))
        keys, length = slice(0, key.shape[2]) if key_starts is None else _piece(key_starts, n), None
        if key_lengths is not None:
            length = int(key_lengths[n])
            keys = slice(keys.start, keys.start + length)
        of_one = mask if mask is None else mask[one, :, :, keys]
        if block_table is None:
            its_key, its_value = key[batch, :, keys], value[batch, :, keys]
        else:
            its_key, its_value = (_gathered(cache, block_table[n], length or 0) for cache in (key, value))
        yield _Sequence(
            batch,
            queries,
            keys if block_table is None else None,
            its_key,
            its_value,
            of_one,
            slopes if slopes is None else slopes[one],
        )


def _piece(starts: Tensor, n: int) -> slice:
    first, end = starts[n : n + 2].tolist()
    return slice(first, end)


def _gathered(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` rows [1, Hkv, length, D] of what lies in `blocks` of a cache [all blocks, Hkv, size, D]."""
    size = cache.shape[2]
    used = blocks[: (length + size - 1) // size].long()
    return cache[used].transpose(0, 1).flatten(1, 2)[None, :, :length]


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, Hkv, S, D] repeated to the query's heads: head h reads h // (H / Hkv)."""
    heads = tensor.shape[1]
    return tensor.repeat_interleave(query.shape[1] // heads, dim=1) if heads else tensor


def _summed_per_key_head(gradient: Tensor, key: Tensor) -> Tensor:
    """The gradient [B, H, S, D] of repeated keys, summed back to [B, Hkv, S, D]."""
    heads = key.shape[1]
    return gradient.unflatten(1, (heads, -1)).sum(2) if heads else gradient


def visible(T: int, S: int, options: AttentionOptions, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see by their places alone, bool [T, S]; `AttentionOptions` draws it."""
    place = torch.arange(T, device=device)[:, None] + (S - T if options.lower_right else 0)
    keys = torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if options.window_left >= 0:
        seen &= keys >= place - options.window_left
    if options.window_right >= 0:
        seen &= keys <= place + options.window_right
    return seen


@dataclass(frozen=True)
class _Scores:
    """Scores on their way to the softmax, [b, H, T, S] each.

    Attributes:
        raw: query · keyᵀ · scale.
        final: What the softmax gets.
        seen: Which pairs are not hidden.
    """

    raw: Tensor
    final: Tensor
    seen: Tensor


def _scores(query: Tensor, sequence: _Sequence, options: AttentionOptions) -> _Scores:
    raw = query @ _per_query_head(computed(sequence.key), query).transpose(-2, -1) * options.scale
    scores = raw
    T, S = raw.shape[-2:]
    if options.softcap > 0:
        scores = options.softcap * (scores / options.softcap).tanh()
    if sequence.alibi_slopes is not None:
        place = torch.arange(T, device=query.device)[:, None] + (S - T if options.lower_right else 0)
        distance = (place - torch.arange(S, device=query.device)).abs()
        scores = scores - sequence.alibi_slopes[:, :, None, None].to(scores.dtype) * distance
    seen = visible(T, S, options, query.device).expand(scores.shape)
    if sequence.mask is not None and sequence.mask.dtype == torch.bool:
        seen = seen & sequence.mask
    elif sequence.mask is not None:
        scores = scores + sequence.mask.to(scores.dtype)
    return _Scores(raw, scores.masked_fill(~seen, -torch.inf), seen)


def _exp_of_difference(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """Probabilities; a query that sees no key, whose logsumexp is -inf, gets 0."""
    return (scores - logsumexp.masked_fill(logsumexp == -torch.inf, 0).unsqueeze(-1)).exp()


def _dropout(options: AttentionOptions, query: Tensor, sequence: _Sequence) -> Tensor | float:
    """What probabilities are multiplied by, [b, H, T, S]."""
    if options.seed is None or options.dropout_p == 0:
        return 1.0
    H, S = query.shape[1], sequence.key.shape[2]
    batches = torch.arange(sequence.batch.start, sequence.batch.stop, device=query.device)
    planes = (batches[:, None] * H + torch.arange(H, device=query.device)).flatten()
    rows = torch.arange(sequence.queries.start, sequence.queries.stop, device=query.device)
    factors = attention_dropout_factors(options.seed, planes, rows, S, options.dropout_p)
    return factors.view(len(batches), H, len(rows), S)


def _heads_inside(tensor: Tensor) -> Tensor:
    """[B, H, T, D] in the memory order (B, T, H, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *options: Tensor | float | bool | int | None
) -> tuple[Tensor, Tensor]:
    """softmax(query · keyᵀ · scale) · value and the logarithm of the softmax's denominator.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, S, D] with H a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        options: As `AttentionOptions` says.

    Returns:
        The output [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and logsumexp [B, H, T] in the
        dtype computed with (float32, or float64 for float64 inputs). A query that sees no key gets 0 and -inf.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    B, H, T, _ = query.shape
    output = computed(query).new_zeros(B, H, T, value.shape[-1])
    logsumexp = output.new_full((B, H, T), -torch.inf)
    for sequence in _sequences(query, key, value, asked):
        q = computed(query[sequence.batch, :, sequence.queries])
        scores = _scores(q, sequence, asked).final
        denominator = scores.logsumexp(-1)
        probabilities = _exp_of_difference(scores, denominator) * _dropout(asked, query, sequence)
        output[sequence.batch, :, sequence.queries] = probabilities @ _per_query_head(computed(sequence.value), q)
        logsumexp[sequence.batch, :, sequence.queries] = denominator
    return _heads_inside(output.to(query.dtype)), logsumexp


def attention_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    lower_right: bool | None,
    window_left: int,
    window_right: int,
) -> Tensor:
    """The output of `attention` alone.

    Args:
        query: [B, H, T, D], or, packed, [all queries, H, D]; key and value likewise.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        mask: Broadcasts to [B, H, T, S]; as `AttentionOptions` says.
        query_starts: As there; none: not packed.
        key_starts: Likewise.
        scale: As there; 1/√D by default.
        enable_gqa: Whether H may be a multiple of Hkv.
        lower_right: As there; none where it does not matter.
        window_left: As there.
        window_right: As there.
    """
    if query_starts is not None:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    options = AttentionOptions(
        mask=None if mask is None else mask.expand(*query.shape[:3], key.shape[2]),
        query_starts=query_starts,
        key_starts=key_starts,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        lower_right=bool(lower_right),
        window_left=window_left,
        window_right=window_right,
        longest_query=0 if query_starts is None else query.shape[2],
    )
    output = attention(query, key, value, *options)[0]
    return output if query_starts is None else output.squeeze(0).transpose(0, 1)


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *options: Tensor | float | bool | int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` with respect to query, key and value, in their dtypes and shapes.

    Args:
        grad_output: [B, H, T, Dv].
        query: As the forward's.
        key: As the forward's; keys in blocks have no gradient.
        value: As the forward's.
        output: The forward's.
        logsumexp: The forward's.
        options: The forward's.
    """
    asked = AttentionOptions(*options)  # type: ignore[arg-type]
    grad_query, grad_key, grad_value = (torch.zeros_like(computed(tensor)) for tensor in (query, key, value))
    for sequence in _sequences(query, key, value, asked):
        place = sequence.batch, slice(None), sequence.queries
        q, do, o = computed(query[place]), computed(grad_output[place]), computed(output[place])
        k, v = (_per_query_head(computed(tensor), q) for tensor in (sequence.key, sequence.value))
        scores = _scores(q, sequence, asked)
        dropout = _dropout(asked, query, sequence)
        probabilities = _exp_of_difference(scores.final, logsumexp[place].to(q.dtype))
        delta = (do * o).sum(-1, keepdim=True)  # [b, H, T, 1]
        grad_scores = probabilities * (do @ v.transpose(-2, -1) * dropout - delta)
        if asked.softcap > 0:
            grad_scores = grad_scores * (1 - (scores.raw / asked.softcap).tanh().square())
        grad_scores = grad_scores.masked_fill(~scores.seen, 0) * asked.scale
        grad_query[place] = grad_scores @ k
        of_keys = sequence.batch, slice(None), sequence.keys
        grad_key[of_keys] = _summed_per_key_head(grad_scores.transpose(-2, -1) @ q, key)
        grad_value[of_keys] = _summed_per_key_head((probabilities * dropout).transpose(-2, -1) @ do, value)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
