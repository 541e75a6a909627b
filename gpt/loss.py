"""The training loss without its logits: cross entropy of a linear layer, a few rows at a time.

GPT-2's logits for B = 4, T = 1024 are 4096 x 50257 numbers: 824 MB in float32, and as much again for their gradient,
where the model itself is 498 MB. Here a chunk of rows gives its logits, its loss and its gradients before the next
chunk begins, so that no more than `CHUNK_BYTES` of logits ever exist.

The gradients are made on the way forward, since the softmax that the loss needs is already there: three matrix
products per chunk, where computing the logits again on the way back would take four.

Measured on 2 threads of a Xeon with AMX, forward and backward together, 1024 x 768 -> 50257, memory kept: in bfloat16
this 0.29 s, all logits at once 0.34; in float32 0.90 and 0.80. Of 4096 rows: 1.1 and 2.4 s; 3.5 and 3.2. On one with
AVX-512 alone chunks recomputed by `torch.utils.checkpoint` took 1.5 to 2.5 times as long as this in float32, torch
2.13's `F.linear_cross_entropy` with its default chunks 4.8 times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from trilby import kernels

from .data import IGNORED

# A chunk of logits, in the dtype of the products. Every chunk reads the vocabulary's weights twice, and reads and
# writes their gradient: with 160 rows of bfloat16 the loss took half of a step of GPT-2, with 512 a quarter.
CHUNK_BYTES = 64 * 2**20
# What of a chunk goes through the softmax at once, in float32, so that a CPU's cache holds it: 23 ms for 512 rows of
# 50257, 49 when all of them go together. A GPU takes the whole chunk; there it is launches that cost.
SOFTMAX_BYTES = 4 * 2**20
# Rows of the weights' gradient that are added up at once, likewise: the products take no memory of their own.
ADDED_ROWS = 2048


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


def rows_per_chunk(rows: int, vocab_size: int, itemsize: int) -> int:
    """How many of the rows make a chunk, so that chunks are about equal and none is larger than `CHUNK_BYTES`.

    A multiple of 16, the height of a matrix tile; 16 where not even they fit.
    """
    most = max(16, CHUNK_BYTES // (itemsize * vocab_size) // 16 * 16)
    chunks = max(1, -(-rows // most))
    return max(16, -(-rows // (16 * chunks)) * 16)


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

        loss = torch.zeros((), dtype=exact, device=input.device)
        grad_input = torch.empty_like(input) if wants_gradients else None
        grad_weight = torch.empty_like(weight, dtype=exact) if wants_gradients else None
        vocabulary = weight.detach().to(dtype)
        rows = rows_per_chunk(len(input), len(weight), vocabulary.itemsize)

        with torch.autocast(device, enabled=False):
            for start in range(0, len(input), rows):
                chunk = slice(start, start + rows)
                hidden = input[chunk].detach().to(dtype)  # (n, C)
                logits = hidden @ vocabulary.T  # (n, V)
                loss += _loss_of(logits, target[chunk, None], exact, wants_gradients)
                if grad_input is not None and grad_weight is not None:
                    grad_input[chunk] = logits @ vocabulary
                    _add_product(grad_weight, logits.T, hidden, is_first=start == 0)

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
        if _is_kept():
            return grad_input * factor, grad_weight * factor, None, None
        return grad_input.mul_(factor), grad_weight.mul_(factor), None, None


def _is_kept() -> bool:
    """Whether what was saved for the backward that runs is wanted again (`retain_graph`), so must not be overwritten.

    A vocabulary's gradient is as large as its weights: to overwrite it takes half the time, and none of their memory.
    """
    is_kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return is_kept


def _loss_of(logits: Tensor, correct: Tensor, exact: torch.dtype, wants_gradients: bool) -> Tensor:
    """The sum of the losses of `logits` (n, V), in `exact`; `correct` is (n, 1).

    Where gradients are wanted logits become theirs, softmax - one-hot: d loss / d logits · count, divided on the way
    back.
    """
    loss = torch.zeros((), dtype=exact, device=logits.device)
    at_once = len(logits)
    if logits.device.type == "cpu":
        at_once = max(1, SOFTMAX_BYTES // (exact.itemsize * logits.shape[1]))
    for few, right in zip(logits.split(at_once), correct.split(at_once)):
        log_probabilities = few.to(exact).log_softmax(1)
        loss -= log_probabilities.gather(1, right).sum()
        if wants_gradients:
            grad = log_probabilities.exp_()
            few.copy_(grad.scatter_add_(1, right, grad.new_full((1, 1), -1.0).expand_as(right)))
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add `left @ right` to `total`, which keeps its own, wider dtype; the first product is what it begins with."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)
        return
    for rows, of_rows in zip(total.split(ADDED_ROWS), left.split(ADDED_ROWS)):
        product = of_rows @ right
        rows.copy_(product) if is_first else rows.add_(product)
