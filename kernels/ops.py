"""Every trilby:: operator in one table: schema, meaning, fake kernel, autograd.

An operator is defined here and nowhere else. Its kernels come from three places: the C++ extension registers the CPU's,
`gpu/` the GPU's on first use, and `reference/` serves every device that neither does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd

from . import native, reference
from .options import TENSORS, AttentionOptions


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
        triton: Whether `gpu` has a kernel of this name; else PyTorch computes the meaning there, too.
    """

    name: str
    schema: str
    meaning: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None
    triton: bool = True


_NO_GRADIENTS = (None,) * len(AttentionOptions._fields)


def _empty_heads_inside(like: Tensor, B: int, H: int, T: int, D: int) -> Tensor:
    """[B, H, T, D] in the memory order (B, T, H, D)."""
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, H, T, _D = query.shape
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty_heads_inside(query, B, H, T, value.shape[-1]), query.new_empty(B, H, T, dtype=statistics)


def _fake_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty_heads_inside(query, *query.shape),
        _empty_heads_inside(key, *key.shape),
        _empty_heads_inside(value, *value.shape),
    )


def _fake_attention_output(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    if query.dim() == 3:
        return query.new_empty(*query.shape[:2], value.shape[-1])
    B, H, T, _D = query.shape
    return _empty_heads_inside(query, B, H, T, value.shape[-1])


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, alibi_slopes, *_ = inputs
    for name, tensor in (("mask", mask), ("alibi_slopes", alibi_slopes)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and trilby::attention has none for it")
    tensors = 3 + TENSORS
    if inputs[tensors - 1] is not None and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("block_table is given, and trilby::attention has no gradients for keys in blocks")
    ctx.numbers = inputs[tensors:]
    ctx.save_for_backward(*inputs[:tensors], *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *tensors, output, logsumexp = ctx.saved_tensors
    options = *tensors, *ctx.numbers
    is_packed = query.dim() == 3  # [rows, H, D], of the short way
    if is_packed:
        query, key, value, output, grad_output = (
            tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value, output, grad_output)
        )
    gradients: tuple[Tensor, ...]
    if torch.is_grad_enabled():  # the gradients are to be differentiated: by way of what the operator means
        meaning = reference.attention(query, key, value, *options)[0]
        gradients = torch.autograd.grad(meaning, (query, key, value), grad_output, create_graph=True)
    else:
        compute = torch.ops.trilby.attention_backward.default
        gradients = compute(grad_output, query, key, value, output, logsumexp, *options)
    if is_packed:
        gradients = tuple(gradient.squeeze(0).transpose(0, 1) for gradient in gradients)
    return *gradients, *_NO_GRADIENTS


def _fake_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_dims: int, centered: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.float64 if input.dtype == torch.float64 else torch.float32
    leading = input.shape[: input.dim() - normalized_dims]
    return (
        input.new_empty(input.shape),
        input.new_empty(leading if centered else (0,), dtype=statistics),
        input.new_empty(leading, dtype=statistics),
    )


def _fake_add_norm(
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
    normalized, mean, rstd = _fake_norm(stream, weight, bias, normalized_dims, centered, eps)
    return normalized, torch.empty_like(normalized), mean, rstd


def _fake_norm_backward(
    grad_normalized: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    absent = summed.new_empty(0)
    return (
        summed.new_empty(summed.shape),
        absent if seed is None else summed.new_empty(summed.shape),
        torch.empty_like(absent) if weight is None else weight.new_empty(weight.shape),
        torch.empty_like(absent) if bias is None else bias.new_empty(bias.shape),
    )


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    stream, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(stream, *output[1:], weight, bias, None)
    ctx.options.append(0.0)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, weight, bias, seed, *ctx.options = inputs
    ctx.save_for_backward(*output[1:], weight, bias, seed)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, grad_normalized: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of stream, branch, weight and bias, by the operator, or differentiably where that is asked for.

    What was saved is taken out once: activation checkpointing computes it for that, and for nothing after it.
    """
    summed, mean, rstd, weight, bias, seed = ctx.saved_tensors
    normalized_dims, centered, eps, dropout_p = ctx.options
    compute: Callable[..., tuple[Tensor, ...]] = torch.ops.trilby.norm_backward
    if torch.is_grad_enabled():
        compute = reference.norm_backward
        mean, rstd = reference.statistics(summed, normalized_dims, centered, eps)
    if grad_normalized is None:
        grad_normalized = torch.zeros_like(summed)
    grad_stream, grad_branch, grad_weight, grad_bias = compute(
        grad_normalized, grad_summed, summed, mean, rstd, weight, bias, seed, normalized_dims, centered, dropout_p
    )
    return (
        grad_stream,
        grad_stream if seed is None else grad_branch,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
    )


def _norm_backward(ctx: Any, grad_normalized: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_input, _branch, *of_parameters = _norm_gradients(ctx, grad_normalized, None)
    return grad_input, *of_parameters, None, None, None


def _add_norm_backward(
    ctx: Any, grad_normalized: Tensor | None, grad_summed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *_norm_gradients(ctx, grad_normalized, grad_summed), *(None,) * 5


# As `AttentionOptions` has them.
ATTENTION_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? seed, Tensor? query_starts, Tensor? key_starts, Tensor? key_lengths, "
    "Tensor? block_table, float scale, bool lower_right, int window_left, int window_right, float softcap, "
    "float dropout_p, int longest_query"
)


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _save_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, weight, _bias, scales = inputs
    if scales is not None and scales.requires_grad:
        raise ValueError("scales requires a gradient, and trilby::linear has none for it")
    ctx.save_for_backward(x, weight, scales)


def _linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scales = ctx.saved_tensors
    scaled = grad_output if scales is None else grad_output * scales.to(grad_output.dtype)
    rows = scaled.reshape(-1, scaled.shape[-1])
    of_input, of_weight, of_bias, _ = ctx.needs_input_grad
    return (
        scaled @ weight.to(scaled.dtype) if of_input else None,
        rows.T @ x.reshape(-1, x.shape[-1]) if of_weight else None,
        grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if of_bias else None,
        None,
    )


def _fake_gelu(input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


def _fake_gelu_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


def _save_gelu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, grad_output: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated, and PyTorch's has a formula for that
        gradient: Tensor = torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh")
    else:
        gradient = torch.ops.trilby.gelu_backward(grad_output, x)
    return gradient


def _fake_decode_blocks(stream: Tensor, *_: Any) -> Tensor:
    return stream.new_empty(stream.shape)


OPERATORS = (
    Operator(
        "attention",
        f"(Tensor query, Tensor key, Tensor value, {ATTENTION_OPTIONS}) -> (Tensor, Tensor)",
        reference.attention,
        _fake_attention,
        _attention_backward,
        _save_attention,
    ),
    Operator(
        "attention_output",
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? query_starts, Tensor? key_starts, "
        "float? scale, bool enable_gqa, bool? lower_right, int window_left, int window_right) -> Tensor",
        reference.attention_output,
        _fake_attention_output,
        triton=False,
    ),
    Operator(
        "attention_backward",
        "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
        f"{ATTENTION_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        reference.attention_backward,
        _fake_attention_backward,
    ),
    Operator(
        "norm",
        "(Tensor input, Tensor? weight, Tensor? bias, int normalized_dims, bool centered, float eps) "
        "-> (Tensor, Tensor, Tensor)",
        reference.norm,
        _fake_norm,
        _norm_backward,
        _save_norm,
    ),
    Operator(
        "add_norm",
        "(Tensor stream, Tensor branch, Tensor? weight, Tensor? bias, Tensor? seed, int normalized_dims, "
        "bool centered, float eps, float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)",
        reference.add_norm,
        _fake_add_norm,
        _add_norm_backward,
        _save_add_norm,
    ),
    Operator(
        "norm_backward",
        "(Tensor grad_normalized, Tensor? grad_summed, Tensor summed, Tensor mean, Tensor rstd, Tensor? weight, "
        "Tensor? bias, Tensor? seed, int normalized_dims, bool centered, float dropout_p) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference.norm_backward,
        _fake_norm_backward,
    ),
    Operator(
        "linear",
        "(Tensor input, Tensor weight, Tensor? bias, Tensor? scales) -> Tensor",
        reference.linear,
        _fake_linear,
        _linear_backward,
        _save_linear,
        triton=False,
    ),
    Operator(
        "gelu",
        "(Tensor input) -> Tensor",
        reference.gelu,
        _fake_gelu,
        _gelu_backward,
        _save_gelu,
        triton=False,
    ),
    Operator(
        "gelu_backward",
        "(Tensor grad_output, Tensor input) -> Tensor",
        reference.gelu_backward,
        _fake_gelu_backward,
        triton=False,
    ),
    Operator(
        "decode_blocks",
        "(Tensor stream, Tensor(a!) memory, Tensor? key_lengths, int length, float eps, Tensor?[] weights) -> Tensor",
        reference.decode_blocks,
        _fake_decode_blocks,
        triton=False,
    ),
)


def _gpu_kernel(name: str) -> Callable[..., Any]:
    """The Triton kernel `name`, imported when it is first called: importing trilby imports no triton."""

    def call(*arguments: Any) -> Any:
        from . import gpu

        return getattr(gpu, name)(*arguments)

    return call


@lru_cache
def reasons_against_gpu(device: torch.device) -> tuple[str, ...]:
    """Why trilby's Triton kernels can't run on the GPU `device`; none: they can."""
    if not torch.cuda.is_available():  # a tensor without numbers, of a GPU that cannot be asked
        return ()
    try:
        from .gpu.targets import device_of

        device_of(torch.empty(0, device=device), "the tensor")
    except ModuleNotFoundError as missing:
        return (f"{missing.name} is not installed",)
    except ValueError as unknown:
        return (str(unknown),)
    return ()


def reasons_against_device(device: torch.device) -> tuple[str, ...]:
    """Why trilby has no kernels for `device`; none: it has."""
    if device.type == "cpu":
        return () if NATIVE.loaded else (NATIVE.reason,)
    if device.type == "cuda":
        return reasons_against_gpu(device)
    return (f"trilby has no kernel for {device.type}",)


def _define(library: Library, operator: Operator) -> None:
    library.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(operator.name, operator.meaning, "CompositeExplicitAutograd")
    if operator.triton:
        library.impl(operator.name, _gpu_kernel(operator.name), "CUDA")
    torch.library.register_fake(f"trilby::{operator.name}", operator.fake, lib=library)
    if operator.backward is not None:
        register_autograd(f"trilby::{operator.name}", operator.backward, setup_context=operator.save, lib=library)


# Kept for the life of the process: torch drops what a Library registered when the Library is collected.
LIBRARY = Library("trilby", "DEF")
for _operator in OPERATORS:
    _define(LIBRARY, _operator)

NATIVE = native.load()
