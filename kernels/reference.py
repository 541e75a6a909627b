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


def _per_row(statistic: Tensor, normalized_dims: int) -> Tensor:
    """One number a row [leading dimensions], made to broadcast along the rows."""
    return statistic[(..., *(None,) * normalized_dims)]


def _over_rows(tensor: Tensor, normalized_dims: int) -> Tensor:
    """The mean along each row [leading dimensions]."""
    return tensor.mean(tuple(range(-normalized_dims, 0)))


def statistics(input: Tensor, normalized_dims: int, centered: bool, eps: float) -> tuple[Tensor, Tensor]:
    """The mean of each row and 1/√(variance + eps), the variance being that of the population.

    Args:
        input: [leading dimensions, normalized dimensions].
        normalized_dims: How many of the last dimensions make a row.
        centered: Layer norm; otherwise RMS norm, whose mean is left out ([0]) and counts as 0 in the variance.
        eps: What is added to the variance.

    Returns:
        Two tensors [leading dimensions] in the dtype computed with.
    """
    x = _computed(input)
    mean = _over_rows(x, normalized_dims) if centered else x.new_empty(0)
    deviation = x - _per_row(mean, normalized_dims) if centered else x
    return mean, (_over_rows(deviation.square(), normalized_dims) + eps).rsqrt()


def _unit(input: Tensor, mean: Tensor, rstd: Tensor, normalized_dims: int, centered: bool) -> Tensor:
    """Rows of `input` with mean 0 (if centered) and mean square 1, in the dtype computed with."""
    x = _computed(input)
    deviation = x - _per_row(mean, normalized_dims) if centered else x
    return deviation * _per_row(rstd, normalized_dims)


def norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_dims: int, centered: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm, or RMS norm where not `centered`: (input - mean) · rstd · weight + bias.

    Args:
        input: [leading dimensions, normalized dimensions].
        weight: [normalized dimensions]; none counts as 1.
        bias: [normalized dimensions]; none counts as 0.
        normalized_dims: How many of the last dimensions make a row.
        centered: Subtract the mean.
        eps: What is added to the variance.

    Returns:
        The normalized input, contiguous and in its dtype, and `statistics`.
    """
    mean, rstd = statistics(input, normalized_dims, centered, eps)
    normalized = _unit(input, mean, rstd, normalized_dims, centered)
    if weight is not None:
        normalized = normalized * _computed(weight)
    if bias is not None:
        normalized = normalized + _computed(bias)
    return normalized.to(input.dtype).contiguous(), mean, rstd


def _multiply_wide(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of 32-bit words; int64 wraps around, which leaves all 64 bits right."""
    product = a * factor
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def random_words(seed: Tensor, plane: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Random 32-bit words by position: Philox4x32-10 (Salmon et al., 2011), as csrc/random.h counts it.

    Args:
        seed: [1] int64, all 64 bits of it.
        plane: int64 below 2^32: which matrix; 0 for a norm.
        row: int64.
        column: int64; broadcasts with `plane` and `row`.

    Returns:
        int64 from 0 to 2^32 - 1, of the broadcast shape.
    """
    group, lane, number = column // 64, column % 16, column % 64 // 16
    counter = [group * 16 + lane, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, plane]
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiply_wide(counter[0], 0xD2511F53)
        high1, low1 = _multiply_wide(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key0, low1, high0 ^ counter[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack(torch.broadcast_tensors(*counter))
    return words.gather(0, number.expand(words.shape[1:]).unsqueeze(0)).squeeze(0)


def dropout_factors(seed: Tensor, like: Tensor, normalized_dims: int, dropout_p: float) -> Tensor:
    """What dropout multiplies by, 0 with probability `dropout_p` and else 1 / (1 - p), in the dtype computed with."""
    rows = like.flatten(0, -normalized_dims - 1) if like.dim() > normalized_dims else like.unsqueeze(0)
    rows = rows.flatten(1)
    row = torch.arange(rows.shape[0], device=like.device).unsqueeze(1)
    column = torch.arange(rows.shape[1], device=like.device)
    words = random_words(seed, torch.zeros_like(column), row, column)
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return ((words >= threshold) * scale).to(_computed(like).dtype).view(like.shape)


def add_norm(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_dims: int,
    centered: bool,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm` of summed = stream + dropout(branch), and summed itself.

    Args:
        stream: [leading dimensions, normalized dimensions].
        branch: The same size and dtype.
        weight: As `norm`'s.
        bias: As `norm`'s.
        seed: [1] int64: which elements dropout drops; none without dropout.
        normalized_dims: As `norm`'s.
        centered: As `norm`'s.
        eps: As `norm`'s.
        dropout_p: The probability that an element of `branch` is dropped.

    Returns:
        The normalized sum, the sum, rounded to their dtype, and the `statistics` of the rounded sum.
    """
    added = _computed(branch)
    if seed is not None:
        added = added * dropout_factors(seed, branch, normalized_dims, dropout_p)
    summed = (_computed(stream) + added).to(stream.dtype).contiguous()
    normalized, mean, rstd = norm(summed, weight, bias, normalized_dims, centered, eps)
    return normalized, summed, mean, rstd


def norm_backward(
    grad_normalized: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_dims: int,
    centered: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `norm` and `add_norm`; those of `mean` and `rstd` are no one's to take.

    Args:
        grad_normalized: The gradient of the normalized output.
        grad_summed: The gradient of the sum, where it is used further.
        summed: What was normalized.
        mean: From the forward.
        rstd: From the forward.
        weight: From the forward.
        bias: From the forward.
        seed: From the forward.
        normalized_dims: From the forward.
        centered: From the forward.
        dropout_p: From the forward.

    Returns:
        The gradients of stream (or input), branch, weight and bias. That of an absent weight or bias is empty ([0]);
        so is that of the branch without dropout, when it equals that of the stream.
    """
    unit = _unit(summed, mean, rstd, normalized_dims, centered)
    grad = _computed(grad_normalized)
    g = grad * _computed(weight) if weight is not None else grad
    grad_stream = g - unit * _per_row(_over_rows(g * unit, normalized_dims), normalized_dims)
    if centered:
        grad_stream = grad_stream - _per_row(_over_rows(g, normalized_dims), normalized_dims)
    grad_stream = grad_stream * _per_row(rstd, normalized_dims)
    if grad_summed is not None:
        grad_stream = grad_stream + _computed(grad_summed)
    grad_branch = summed.new_empty(0)
    if seed is not None:
        grad_branch = grad_stream * dropout_factors(seed, summed, normalized_dims, dropout_p)

    def of_weight(parameter: Tensor | None, gradient: Tensor) -> Tensor:
        return summed.new_empty(0) if parameter is None else gradient.sum_to_size(parameter.shape).to(parameter.dtype)

    return (
        grad_stream.to(summed.dtype).contiguous(),
        grad_branch.to(summed.dtype).contiguous(),
        of_weight(weight, grad * unit),
        of_weight(bias, grad),
    )
