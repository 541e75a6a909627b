"""What the linear layer means."""

from torch import Tensor

from .dtypes import computed


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    """Input · weightᵀ · scales + bias.

    Args:
        input: [..., K].
        weight: [N, K], in input's dtype, or int8 with `scales`.
        bias: [N], in input's dtype; none counts as 0.
        scales: [N] float32, what a row of int8 weights stands for is multiplied by; none counts as 1.

    Returns:
        [..., N] in input's dtype.
    """
    x = computed(input)
    product = x @ weight.to(x.dtype).T
    if scales is not None:
        product = product * scales.to(x.dtype)
    if bias is not None:
        product = product + computed(bias)
    return product.to(input.dtype)
