"""trilby as PyTorch's own: `activate()`, and every model in the process runs trilby's kernels where they are faster.

While activated, the C++ kernels of csrc/bindings_provider.cpp stand in PyTorch's dispatcher for attention and layer
norm on CPUs, composed.py's for what PyTorch composes of several operators, and provider_on_gpu.py's on GPUs. All above
them stays PyTorch's: the choice of an attention implementation, autograd, autocast, vmap, `torch.compile`. What trilby
does not cover runs the kernel of PyTorch that was there before, bit by bit.

Measured on one thread, in µs of processor time: a call that is handed on costs 1 more for attention (7 in all); a layer
norm of 4 · 64 elements 2 more forward (6 in PyTorch) and 4 more forward and backward (48 in PyTorch).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel
from torch.nn import attention as pytorch_attention

from . import attention_rules as rules
from . import composed, provider_on_gpu
from .native import REBUILD
from .norm_rules import reasons_against_kernel
from .ops import NATIVE
from .override import Override, StandIn, has_kernel_of_its_own, release_all, stand_in

NAME = "trilby"  # among PyTorch's implementations of flash attention

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_FOR_GOOD = object()  # what `activate` holds the overrides for


def _pytorchs(*operators: str) -> Library:
    """Operators of trilby that run the kernels which those of PyTorch have now, to hand calls on to."""
    library = Library("trilby", "IMPL")
    for name in operators:
        kernel = get_kernel(f"aten::{name}", "CPU")

        def call(*arguments: Any, _kernel: Any = kernel) -> Any:
            return _kernel.call_boxed(_CPU, *arguments)

        library.impl(f"pytorch_{name}", call, "CPU")
    return library


def reasons_against_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[str, ...]:
    """Every reason why a layer norm is PyTorch's to compute while trilby is in its place: as in the C++ kernels."""
    alone = ("a row has one element",) if all(length == 1 for length in normalized_shape) else ()
    return alone + reasons_against_kernel(input, normalized_shape, weight, bias)


_libraries: dict[str, list[Library]] = {"attention": [], "norm": []}


def _destroy(subject: str) -> None:
    while _libraries[subject]:
        _libraries[subject].pop()._destroy()


def _stand_in(subject: str, keys: tuple[str, ...], calls: Mapping[str, type[StandIn]]) -> None:
    _libraries[subject] += [stand_in(operator, keys, call) for operator, call in calls.items()]


def _stand_in_on_gpu(subject: str, calls: Mapping[str, type[StandIn]]) -> None:
    (key,) = keys = provider_on_gpu.KEYS
    _stand_in(subject, keys, {name: call for name, call in calls.items() if has_kernel_of_its_own(name, key)})


def _provide_attention() -> None:
    _stand_in_on_gpu("attention", provider_on_gpu.ATTENTION)
    if NATIVE.loaded:
        torch.ops.trilby.provide_attention(
            rules.FEWEST_QUERIES,
            rules.FEWEST_MULTIPLICATIONS,
            rules.FEWEST_MASKED_MULTIPLICATIONS,
            rules.LARGEST_HEAD_DIM,
            rules.MOST_DECODED,
            rules.MOST_DECODED_ROWS,
            rules.FEW_DECODED,
            [rules.FEWEST_DECODED[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)],
            rules.FEW_KEYS,
            [queries for limits in rules.FEWEST_IN_PLACE.values() for queries in limits],
        )
        _stand_in("attention", composed.KEYS, composed.ATTENTION)
        _libraries["attention"].append(_pytorchs("_native_multi_head_attention"))
        torch.ops.trilby.provide_encoder()


def _withdraw_attention() -> None:
    if NATIVE.loaded:
        torch.ops.trilby.withdraw_attention()
        torch.ops.trilby.withdraw_encoder()
    _destroy("attention")


def _provide_norm() -> None:
    _stand_in_on_gpu("norm", provider_on_gpu.NORM)
    if NATIVE.loaded:
        _libraries["norm"].append(_pytorchs("native_layer_norm", "native_layer_norm_backward"))
        _stand_in("norm", composed.KEYS, composed.NORM)
        torch.ops.trilby.provide_layer_norm()


def _withdraw_norm() -> None:
    if NATIVE.loaded:
        torch.ops.trilby.withdraw_layer_norm()
    _destroy("norm")


ATTENTION = Override(_provide_attention, _withdraw_attention)
NORM = Override(_provide_norm, _withdraw_norm)


_warned: list[str] = []


def _warn_once(stacklevel: int) -> None:
    """Say that there is nothing to activate, once a process."""
    if not _warned:
        _warned.append(NATIVE.reason)
        message = (
            f"trilby has nothing to activate on CPUs: {NATIVE.reason}. PyTorch's own kernels run; to mend it: {REBUILD}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def _hold(holder: object, stacklevel: int) -> None:
    if not NATIVE.loaded:
        _warn_once(stacklevel + 1)
    ATTENTION.hold(holder)
    NORM.hold(holder)


def activate() -> None:
    """Let trilby compute every attention and norm of this process, in any model, unchanged.

    `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, `F.layer_norm`,
    `F.rms_norm`, `nn.LayerNorm`, `nn.RMSNorm` and all that is made of them run trilby's kernels from now on, forward
    and backward, until `restore`. Attention that trilby has no faster kernel for (few queries, float64) stays
    PyTorch's, as it does in `trilby.kernels.scaled_dot_product_attention`; so do norms in other dtypes than float32,
    bfloat16 and float16, and small RMS norms. `explain` tells which call is whose, and why.
    Activating twice is activating once.

    On GPUs it is attention without masks and dropout, and layer norms, that Triton kernels compute; RMS norms stay
    PyTorch's. That has been tested without a GPU, and no time of it has been measured on one.

    Call it while no other thread is inside a model: PyTorch's table of kernels is written to.

    Warns:
        RuntimeWarning: If trilby's C++ extension is missing. PyTorch computes everything then, as before.
    """
    _hold(_FOR_GOOD, stacklevel=3)


def restore() -> None:
    """Put PyTorch's own kernels back, whoever activated trilby's, and inside every `activated`, too."""
    # torch 2.10's registry cannot be told, and goes on saying that trilby is its choice.
    can_be_told = hasattr(pytorch_attention, "restore_flash_attention_impl")
    if can_be_told and pytorch_attention.current_flash_attention_impl() == NAME:
        pytorch_attention.restore_flash_attention_impl()
    release_all(ATTENTION, NORM)


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
