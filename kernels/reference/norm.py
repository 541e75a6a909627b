"""What the norms mean: layer norm and RMS norm, alone or after a residual add with dropout, and their gradients."""

from torch import Tensor

from .dtypes import computed
from .random import dropout_factors


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
    x = computed(input)
    mean = _over_rows(x, normalized_dims) if centered else x.new_empty(0)
    deviation = x - _per_row(mean, normalized_dims) if centered else x
    return mean, (_over_rows(deviation.square(), normalized_dims) + eps).rsqrt()


def _unit(input: Tensor, mean: Tensor, rstd: Tensor, normalized_dims: int, centered: bool) -> Tensor:
    """Rows of `input` with mean 0 (if centered) and mean square 1, in the dtype computed with."""
    x = computed(input)
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
        normalized = normalized * computed(weight)
    if bias is not None:
        normalized = normalized + computed(bias)
    return normalized.to(input.dtype).contiguous(), mean, rstd


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
    added = computed(branch)
    if seed is not None:
        added = added * dropout_factors(seed, branch, normalized_dims, dropout_p)
    summed = (computed(stream) + added).to(stream.dtype).contiguous()
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
    grad = computed(grad_normalized)
    g = grad * computed(weight) if weight is not None else grad
    grad_stream = g - unit * _per_row(_over_rows(g * unit, normalized_dims), normalized_dims)
    if centered:
        grad_stream = grad_stream - _per_row(_over_rows(g, normalized_dims), normalized_dims)
    grad_stream = grad_stream * _per_row(rstd, normalized_dims)
    if grad_summed is not None:
        grad_stream = grad_stream + computed(grad_summed)
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
