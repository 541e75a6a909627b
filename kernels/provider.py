"""trilby as PyTorch's own: `activate()`, and every model in the process runs trilby's kernels where they are faster.

While activated, the C++ kernels of csrc/bindings_provider.cpp stand in PyTorch's dispatcher for attention and layer
norm on CPUs. All above them stays PyTorch's: the choice of an attention implementation, autograd, autocast, vmap,
`torch.compile`. What trilby does not cover runs the kernel of PyTorch that was there before, bit by bit.

Measured on one thread, in µs of processor time: a call that is handed on costs 1 more for attention (7 in all); a layer
norm of 4 · 64 elements 2 more forward (6 in PyTorch) and 4 more forward and backward (48 in PyTorch).
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.library import Library, get_kernel
from torch.nn import attention as pytorch_attention

from . import attention
from .native import REBUILD
from .ops import NATIVE

NAME = "trilby"  # among PyTorch's implementations of flash attention

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_LOCK = threading.RLock()
_FOR_GOOD = object()  # what `activate` holds the overrides for


@dataclass(frozen=True)
class Override:
    """Operators of PyTorch that are trilby's for as long as anyone holds them.

    Attributes:
        provide: Puts trilby's kernels in place of PyTorch's.
        withdraw: Puts PyTorch's back.
        holders: Who wants trilby's: `activate`, each `activated` that is open, PyTorch's registry.
    """

    provide: Callable[[], None]
    withdraw: Callable[[], None]
    holders: set[object] = field(default_factory=set)

    def hold(self, holder: object) -> None:
        """Override, if nobody held it before."""
        with _LOCK:
            if not self.holders and NATIVE.loaded:
                _without_warning(self.provide)
            self.holders.add(holder)

    def release(self, *holders: object) -> None:
        """Put PyTorch's kernels back, if nobody else holds it; `holders` may have let go before."""
        with _LOCK:
            held = bool(self.holders)
            self.holders.difference_update(holders)
            if held and not self.holders and NATIVE.loaded:
                self.withdraw()


def _pytorchs_norms() -> Library:
    """Operators of trilby that run the kernels which layer norms have now, to hand calls on to."""
    library = Library("trilby", "IMPL")
    for name in ("layer_norm", "layer_norm_backward"):
        kernel = get_kernel(f"aten::native_{name}", "CPU")

        def call(*arguments: Any, _kernel: Any = kernel) -> Any:
            return _kernel.call_boxed(_CPU, *arguments)

        library.impl(f"pytorch_{name}", call, "CPU")
    return library


def _without_warning(override: Callable[[], None]) -> None:
    """Call `override`, and let PyTorch not warn that kernels are overridden: that is what was asked for.

    PyTorch warns once a process, from C++, past Python's filters. So the warning is used up on an operator of trilby,
    overridden from Python, before `override` comes.
    """
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            first, second = _pytorchs_norms(), _pytorchs_norms()
        second._destroy()
        first._destroy()
        override()
    finally:
        torch.set_warn_always(always)


_norms: list[Library] = []


def _provide_attention() -> None:
    limits = attention.FEWEST_QUERIES, attention.FEWEST_MULTIPLICATIONS, attention.LARGEST_HEAD_DIM
    torch.ops.trilby.provide_attention(*limits)


def _withdraw_attention() -> None:
    torch.ops.trilby.withdraw_attention()


def _provide_norm() -> None:
    _norms.append(_pytorchs_norms())
    torch.ops.trilby.provide_layer_norm()


def _withdraw_norm() -> None:
    torch.ops.trilby.withdraw_layer_norm()
    _norms.pop()._destroy()


ATTENTION = Override(_provide_attention, _withdraw_attention)
NORM = Override(_provide_norm, _withdraw_norm)


def _hold(holder: object, stacklevel: int) -> None:
    if not NATIVE.loaded:
        message = f"trilby has nothing to activate: {NATIVE.reason}. PyTorch's own kernels run; to mend it: {REBUILD}"
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
    ATTENTION.hold(holder)
    NORM.hold(holder)


def activate() -> None:
    """Let trilby compute every attention and layer norm of this process on CPUs, in any model, unchanged.

    `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, `F.layer_norm`,
    `nn.LayerNorm` and all that is made of them run trilby's kernels from now on, forward and backward, until `restore`.
    Attention that trilby has no faster kernel for (a mask, few queries, float64) stays PyTorch's, as it does in
    `trilby.kernels.scaled_dot_product_attention`; so do layer norms in other dtypes than float32, bfloat16 and float16.
    RMS norms are made of PyTorch's elementwise operators and stay so. Activating twice is activating once.

    Call it while no other thread is inside a model: PyTorch's table of kernels is written to.

    Warns:
        RuntimeWarning: If trilby's C++ extension is missing. PyTorch computes everything then, as before.
    """
    _hold(_FOR_GOOD, stacklevel=3)


def restore() -> None:
    """Put PyTorch's own kernels back, whoever activated trilby's, and inside every `activated`, too."""
    with _LOCK:
        if getattr(pytorch_attention, "current_flash_attention_impl", lambda: None)() == NAME:
            pytorch_attention.restore_flash_attention_impl()
        ATTENTION.release(*ATTENTION.holders)
        NORM.release(*NORM.holders)


@contextmanager
def activated() -> Iterator[None]:
    """`activate` for the length of a with-block, or of a function that it decorates; then as it was before.

    Blocks may be nested, and open in several threads: trilby's kernels are in place until the last one ends.

    Warns:
        RuntimeWarning: If trilby's C++ extension is missing.
    """
    holder = object()
    _hold(holder, stacklevel=4)  # past contextlib
    try:
        yield
    finally:
        ATTENTION.release(holder)
        NORM.release(holder)


class _FromRegistry:
    """What PyTorch's registry of flash attention holds while trilby is its choice: attention alone."""

    def __init__(self) -> None:
        ATTENTION.hold(self)

    def remove(self) -> None:
        """Called when another implementation is chosen."""
        ATTENTION.release(self)


# A name in a table: nothing is overridden before `torch.nn.attention.activate_flash_attention_impl("trilby")`.
if hasattr(pytorch_attention, "register_flash_attention_impl"):
    pytorch_attention.register_flash_attention_impl(NAME, register_fn=_FromRegistry)
