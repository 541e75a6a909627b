"""Every trilby:: operator in one table: schema, meaning, fake kernel, autograd.

An operator is defined here and nowhere else. Its kernels come from three places: the C++ extension registers the CPU's,
`gpu/` the GPU's on first use, and `reference.py` serves every device that neither does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd

from . import native, reference


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: Its name in the trilby namespace, and of its kernels in `gpu`.
        schema: Arguments and results, in the dispatcher's language.
        meaning: The reference, and the kernel of every device that has no other.
        fake: Sizes, strides and dtypes of the results without computing them.
        backward: The gradient formula `(ctx, *gradients) -> gradients of the arguments`; None: not differentiable.
        save: What the forward keeps for it: `(ctx, inputs, output) -> None`.
    """

    name: str
    schema: str
    meaning: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None


def _empty_heads_inside(like: Tensor, B: int, H: int, T: int, D: int) -> Tensor:
    """[B, H, T, D] in the memory order (B, T, H, D)."""
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty_heads_inside(query, B, H, T, value.shape[-1]), query.new_empty(B, H, T, dtype=statistics)


def _fake_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty_heads_inside(query, *query.shape),
        _empty_heads_inside(key, *key.shape),
        _empty_heads_inside(value, *value.shape),
    )


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.trilby.attention_backward(
        grad_output, *ctx.saved_tensors, ctx.is_causal, ctx.scale
    )
    return (*gradients, None, None)


OPERATORS = (
    Operator(
        "attention",
        "(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> (Tensor, Tensor)",
        reference.attention,
        _fake_attention,
        _attention_backward,
        _save_attention,
    ),
    Operator(
        "attention_backward",
        "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
        "bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
        reference.attention_backward,
        _fake_attention_backward,
    ),
)


def _gpu_kernel(name: str) -> Callable[..., Any]:
    """The Triton kernel `name`, imported when it is first called: importing trilby imports no triton."""

    def call(*arguments: Any) -> Any:
        from . import gpu

        return getattr(gpu, name)(*arguments)

    return call


def _define(library: Library, operator: Operator) -> None:
    library.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(operator.name, operator.meaning, "CompositeExplicitAutograd")
    library.impl(operator.name, _gpu_kernel(operator.name), "CUDA")
    torch.library.register_fake(f"trilby::{operator.name}", operator.fake, lib=library)
    if operator.backward is not None:
        register_autograd(f"trilby::{operator.name}", operator.backward, setup_context=operator.save, lib=library)


# Kept for the life of the process: torch drops what a Library registered when the Library is collected.
LIBRARY = Library("trilby", "DEF")
for _operator in OPERATORS:
    _define(LIBRARY, _operator)

NATIVE = native.load()
