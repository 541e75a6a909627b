"""What each operator means, in plain PyTorch at any precision: the specification, and the oracle of the tests.

Nothing here is fast, and nothing here is fused: scores are written out, one expression says one thing. Half precision
inputs are computed with in float32 and rounded once at the end, so that in float64 this is the truth to compare with.
"""

import torch
from torch import Tensor


def _computed(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that is computed with."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, Hkv, S, D] repeated to the query's heads: head h reads h // (H / Hkv)."""
    heads = tensor.shape[1]
    return tensor.repeat_interleave(query.shape[1] // heads, dim=1) if heads else tensor


def _summed_per_key_head(gradient: Tensor, key: Tensor) -> Tensor:
    """The gradient [B, H, S, D] of repeated keys, summed back to [B, Hkv, S, D]."""
    heads = key.shape[1]
    return gradient.unflatten(1, (heads, -1)).sum(2) if heads else gradient


def visible(query_length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """The causal mask [T, S], aligned to the top left: query i sees keys 0..i.

    For T = 3, S = 5 (1 = seen)::

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
    """
    return torch.ones(query_length, key_length, dtype=torch.bool, device=device).tril()


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(query · keyᵀ · scale) · value and the logarithm of the softmax's denominator.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, S, D] with H a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        is_causal: Hide from query i every key after i.
        scale: What scores are multiplied by.

    Returns:
        The output [B, H, T, Dv] in query's dtype, laid out in memory as (B, T, H, Dv), and logsumexp [B, H, T] in the
        dtype computed with (float32, or float64 for float64 inputs). A query that sees no key gets 0 and -inf.
    """
    scores = _computed(query) @ _per_query_head(_computed(key), query).transpose(-2, -1) * scale  # [B, H, T, S]
    if is_causal:
        scores = scores.masked_fill(~visible(query.shape[2], key.shape[2], query.device), -torch.inf)
    logsumexp = scores.logsumexp(-1)
    probabilities = (scores - logsumexp.masked_fill(logsumexp == -torch.inf, 0).unsqueeze(-1)).exp()
    output = probabilities @ _per_query_head(_computed(value), query)  # [B, H, T, Dv]
    return output.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), logsumexp


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` with respect to query, key and value, in their dtypes and shapes."""
    q, do = _computed(query), _computed(grad_output)
    k, v = _per_query_head(_computed(key), query), _per_query_head(_computed(value), query)
    scores = q @ k.transpose(-2, -1) * scale
    if is_causal:
        scores = scores.masked_fill(~visible(query.shape[2], key.shape[2], query.device), -torch.inf)
    shift = logsumexp.to(scores.dtype)
    probabilities = (scores - shift.masked_fill(shift == -torch.inf, 0).unsqueeze(-1)).exp()
    grad_probabilities = do @ v.transpose(-2, -1)
    delta = (do * _computed(output)).sum(-1, keepdim=True)  # [B, H, T, 1]
    grad_scores = probabilities * (grad_probabilities - delta)
    if is_causal:
        grad_scores = grad_scores.masked_fill(~visible(query.shape[2], key.shape[2], query.device), 0)
    grad_query = grad_scores @ k * scale
    grad_key = _summed_per_key_head(grad_scores.transpose(-2, -1) @ q * scale, key)
    grad_value = _summed_per_key_head(probabilities.transpose(-2, -1) @ do, value)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
