"""The training loss without its logits: cross entropy of a linear layer, a few rows at a time.

GPT-2's logits for B = 4, T = 1024 are 4096 x 50257 numbers: 824 MB in float32, and as much again for their gradient,
where the model itself is 498 MB. Here a chunk of rows gives its logits, its loss and its gradients before the next
chunk begins, so that no more than `CHUNK_BYTES` of logits ever exist.

The gradients are made on the way forward, since the softmax that the loss needs is already there: three matrix
products per chunk, where computing the logits again on the way back would take four.

Measured on 2 threads of a Xeon with AVX-512, forward and backward together, 1024 x 768 -> 50257, float32: this 1.3 s;
all logits at once 1.4 to 2.2 s; chunks recomputed by `torch.utils.checkpoint` 1.9 to 3.2 s; torch 2.13's
`F.linear_cross_entropy` with its default chunks 6.2 s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from trilby import kernels

from .data import IGNORED

# A chunk of logits in float32. Above 32 MiB the C allocator returns each buffer to the system and pays for its pages
# again; at 16 MiB the products are too thin and the step takes a fifth longer.
CHUNK_BYTES = 32 * 2**20


def linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, count: int | None = None) -> Tensor:
    """Mean over the rows of `F.cross_entropy(F.linear(input, weight), target)`.

    Under autocast the products run in autocast's dtype, where that is the faster one (`product_dtype`); the softmax,
    the loss and the sums over chunks are float32 (float64 for float64 arguments).

    Args:
        input: (N, C), what the last layer puts out.
        weight: (V, C), one row per token of the vocabulary.
        target: (N), int64, the token that came next; -100 where none is to be predicted, which costs nothing.
        count: What the sum of the losses is divided by, instead of the number of targets.

    Returns:
        The mean loss in nats, a scalar.

    Raises:
        ValueError: the shapes do not fit, or there is no target to take the mean of.
        RuntimeError: in the backward pass, if second derivatives are asked for (`create_graph`).
    """
    if input.ndim != 2 or weight.ndim != 2 or input.shape[1] != weight.shape[1]:
        raise ValueError(
            f"input is {tuple(input.shape)} and weight {tuple(weight.shape)}; they must be (N, C) and (V, C)"
        )
    if target.shape != input.shape[:1]:
        raise ValueError(f"target is {tuple(target.shape)}; it must be ({input.shape[0]},)")
    predicted = target != IGNORED
    if not predicted.all():
        return linear_cross_entropy(input[predicted], weight, target[predicted], count)
    count = len(target) if count is None else count
    if count < 1:
        raise ValueError(f"target has {len(target)} to predict and count is {count}; at least 1 is needed")
    loss: Tensor = _LinearCrossEntropy.apply(input, weight, target, count)  # type: ignore[no-untyped-call]
    return loss


def rows_per_chunk(vocab_size: int) -> int:
    """How many rows of float32 logits fit into `CHUNK_BYTES`: a multiple of 16, the height of a matrix tile."""
    return max(16, CHUNK_BYTES // (4 * vocab_size) // 16 * 16)


def product_dtype(device: str, weight_dtype: torch.dtype) -> torch.dtype:
    """What the matrix products run in on a `device` of this type: autocast's dtype, or the weights' own.

    Where a processor multiplies bfloat16 more slowly than float32 (`kernels.BFLOAT16_IS_SLOW`), the products of
    float32 weights stay float32: on a Xeon with AVX512-BF16 the loss of 1024 tokens takes 2.2 s in one, 1.3 in the
    other.
    """
    if not torch.is_autocast_enabled(device):
        return weight_dtype
    dtype = torch.get_autocast_dtype(device)
    return weight_dtype if device == "cpu" and dtype == torch.bfloat16 and kernels.BFLOAT16_IS_SLOW else dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor, target: Tensor, count: int) -> Tensor:
        device = input.device.type
        dtype = product_dtype(device, weight.dtype)
        exact = torch.promote_types(weight.dtype, torch.float32)  # of everything else
        wants_gradients = any(ctx.needs_input_grad)  # type: ignore[attr-defined]

        N = input.shape[0]
        loss = torch.zeros((), dtype=exact, device=input.device)
        grad_input = torch.empty_like(input) if wants_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_gradients else None
        vocabulary = weight.detach().to(dtype)
        chunk = rows_per_chunk(weight.shape[0])

        with torch.autocast(device, enabled=False):
            for start in range(0, N, chunk):
                rows = slice(start, start + chunk)
                hidden = input[rows].detach().to(dtype)  # (n, C)
                correct = target[rows, None]  # (n, 1)
                logits = (hidden @ vocabulary.T).to(exact)  # (n, V)
                logsumexp = logits.logsumexp(dim=1, keepdim=True)
                loss += (logsumexp - logits.gather(1, correct)).sum()
                if grad_input is not None and grad_weight is not None:
                    # d loss / d logits · count = softmax - one-hot, in place of the logits; divided on the way back
                    grad = logits.sub_(logsumexp).exp_()
                    grad.scatter_add_(1, correct, grad.new_full((1, 1), -1.0).expand_as(correct))
                    grad = grad.to(dtype)
                    grad_input[rows] = grad @ vocabulary
                    _add_product(grad_weight, grad.T, hidden)

        if grad_input is not None and grad_weight is not None:
            ctx.save_for_backward(grad_input, grad_weight.to(weight.dtype))
            ctx.count = count  # type: ignore[attr-defined]
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():  # only under create_graph, where a gradient without a graph would count as constant
            raise RuntimeError("linear_cross_entropy has no second derivatives; take those of F.cross_entropy")
        grad_input, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        factor = grad_output / ctx.count  # type: ignore[attr-defined]
        return grad_input * factor, grad_weight * factor, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which keeps its own, wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
