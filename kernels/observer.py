"""Sees the calls of attention and norms as PyTorch's dispatcher does: for `explain` and `strict`.

While a thread watches, a kernel in Python stands above the one that each observed operator has, whoever it belongs to;
it tells the watcher and lets the call through. While nobody watches there is none, and no call is slower.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.library import Library, get_kernel

from .override import Override, has_kernel

Watcher = Callable[["Call", Callable[[], Any]], Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: "aten::native_layer_norm", as PyTorch's profiler names it.
        arguments: What it was called with, by name, defaults filled in.
        handed_over: Why one of trilby's own functions left the call to PyTorch's; none: it was not asked.
    """

    operator: str
    arguments: dict[str, Any]
    handed_over: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Where it is computed: "cpu", "cuda"."""
        return next(value.device.type for value in self.arguments.values() if isinstance(value, Tensor))


# Operators with kernels, where this torch has one for the device; and those that PyTorch composes of others: there,
# above autograd and below.
_COMPUTED = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::native_layer_norm",
    "aten::native_layer_norm_backward",
    "aten::_native_multi_head_attention",
    "trilby::attention",
    "trilby::attention_output",
    "trilby::attention_backward",
    "trilby::norm",
    "trilby::add_norm",
    "trilby::norm_backward",
    "trilby::linear",
    "trilby::decode_blocks",
    "trilby::gelu",
    "trilby::gelu_backward",
)
_COMPOSED = ("aten::_scaled_dot_product_attention_math", "aten::rms_norm")
OBSERVED = dict.fromkeys(_COMPUTED, ("CPU", "CUDA")) | dict.fromkeys(_COMPOSED, ("CPU", "AutogradCPU"))


class _Watching(threading.local):
    """Who watches in this thread, the last to come first, and why what is called now was handed over."""

    watcher: Watcher | None = None
    handed_over: tuple[str, ...] = ()


_watching = _Watching()
LIBRARIES: list[Library] = []  # empty while nobody watches, in any thread


def _provide() -> None:
    for operator, keys in OBSERVED.items():
        namespace, name = operator.split("::")
        library = Library(namespace, "IMPL")
        LIBRARIES.append(library)
        for key, below in [(key, get_kernel(operator, key)) for key in keys if has_kernel(operator, key)]:
            library.impl(name, _kernel(operator, below), key, with_keyset=True, allow_override=True)


def _withdraw() -> None:
    while LIBRARIES:
        LIBRARIES.pop()._destroy()


OBSERVERS = Override(_provide, _withdraw, on_top=True)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let `watcher(call, compute)` stand for every observed call of this thread; it returns `compute()`, or raises."""
    holder, before = object(), _watching.watcher
    OBSERVERS.hold(holder)
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = before
        OBSERVERS.release(holder)


def _kernel(operator: str, below: Any) -> Callable[..., Any]:
    """What stands above the kernel `below`."""
    namespace, name = operator.split("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema

    def call(keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> Any:
        def compute() -> Any:
            return below.call_boxed(keys, *given, **named)

        watcher = _watching.watcher
        if watcher is None:
            return compute()
        arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        arguments |= dict(zip((a.name for a in schema.arguments), given)) | named
        return watcher(Call(operator, arguments, _watching.handed_over), compute)

    return call


def hand_over(reasons: tuple[str, ...], compute: Callable[[], Result]) -> Result:
    """`compute()`, by which a function of trilby's own leaves a call to PyTorch's, `reasons` being why."""
    if torch.compiler.is_compiling() or _watching.watcher is None:
        return compute()
    before, _watching.handed_over = _watching.handed_over, reasons
    try:
        return compute()
    finally:
        _watching.handed_over = before


def hand_over_unseen(
    operator: str, arguments: dict[str, Any], reasons: tuple[str, ...], compute: Callable[[], Result]
) -> Result:
    """`hand_over`, to a function of PyTorch's whose operators nobody observes."""
    watcher = None if torch.compiler.is_compiling() else _watching.watcher
    return compute() if watcher is None else cast(Result, watcher(Call(operator, arguments, reasons), compute))
