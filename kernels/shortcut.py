"""The short way into an operator: past what a plain call has no use for.

Measured on one thread, attention of four queries, in µs of processor time: an operator called from Python, its
gradients registered with `torch.library.register_autograd`, takes 12 forward, 154 forward and backward; by the short
way 4.5 and 84; `F.scaled_dot_product_attention`, C++ throughout, 6.4 and 80. So it is the short way that lets trilby's
kernels be the faster ones on small calls, too.

It is taken only where nothing could notice: eager mode, ordinary tensors, no transform, no mode, no tracing. Any other
call goes through PyTorch's dispatcher in full. Both ways share the operator's one row in `ops.OPERATORS`. On a GPU what
is saved is the processor's time, too, which is what small launches wait for.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .ops import OPERATORS, Operator

_CPU, _GPU = (torch._C.DispatchKeySet(key) for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA))
# What PyTorch consults for an ordinary tensor on a CPU, and for a thread that is in no mode and no transform.
_ORDINARY = torch._C._dispatch_keys(torch.empty(0))
_NO_MODE = torch._C._dispatch_tls_local_include_set()


@cache
def _ordinary_on_gpu() -> torch._C.DispatchKeySet:
    """What PyTorch consults for an ordinary tensor on a GPU, of AMD's too."""
    return torch._C._dispatch_keys(torch.empty(0, device="cuda"))


def is_ordinary(*tensors: Tensor | None, on_gpu: bool = False) -> bool:
    """Whether `tensors` are plain tensors of a CPU or, all of them, of GPUs, and nothing else wants to see them.

    That is outside of every mode, transform and level of forward differentiation.
    """
    if torch._C._dispatch_tls_local_include_set() != _NO_MODE or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, Parameter):
            return False
        if torch._C._dispatch_keys(tensor) != (_ordinary_on_gpu() if on_gpu else _ORDINARY):
            return False
    return True


def is_eager(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call of attention is computed here and now, on a CPU, in no transform that operators need rules for."""
    return (
        not torch.compiler.is_compiling()
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def wants_gradient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether somebody may want a gradient of the call."""
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def reasons_of_context() -> tuple[str, ...]:
    """Why a call is PyTorch's to compute, whatever it is: what the thread is in the midst of."""
    if torch._C._are_functorch_transforms_active():
        return ("a transform of torch.func is active, and operators from outside PyTorch have no rule for those",)
    if forward_ad._current_level >= 0:
        return ("forward-mode differentiation is active, and trilby has no formula for it",)
    return ()


def _function(operator: Operator, compute: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd node made of the operator's own row."""
    assert operator.save is not None
    assert operator.backward is not None
    save, differentiate = operator.save, operator.backward

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = compute(*arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    Function.__name__ = operator.name  # what a profiler calls it, and its backward
    apply: Callable[..., Any] = Function.apply
    return apply


def short_way(
    name: str, tensors: int, around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """The operator `name`, whose first `tensors` arguments are tensors or None, to be called as often as wanted.

    `around` brings arguments and results from one layout to another: within the autograd node, where views cost no
    nodes of their own.
    """
    operator = next(operator for operator in OPERATORS if operator.name == name)
    in_full = getattr(torch.ops.trilby, name).default
    redispatch = in_full._handle.redispatch_boxed
    computes: list[Callable[..., Any]] = [partial(redispatch, keys) for keys in (_CPU, _GPU)]
    if around is not None:
        in_full, computes = around(in_full), [around(compute) for compute in computes]
    differentiably = [in_full if operator.backward is None else _function(operator, compute) for compute in computes]

    def call(*arguments: Any) -> Any:
        on_gpu = arguments[0].is_cuda
        if torch.compiler.is_compiling() or not is_ordinary(*arguments[:tensors], on_gpu=on_gpu):
            return in_full(*arguments)
        if torch.is_grad_enabled():
            for tensor in arguments[:tensors]:
                if tensor is not None and tensor.requires_grad:
                    return differentiably[on_gpu](*arguments)
        return computes[on_gpu](*arguments)

    return call
