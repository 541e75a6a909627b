"""Who computes: `explain` tells which kernel a call runs, and why; `strict` raises where it would be PyTorch's.

Both see the calls as PyTorch's dispatcher does, in any function, and say what was run: the C++ kernels count their
calls, and the reasons are those of the rules that chose.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention, composed, norm
from .observer import Call, watched
from .ops import NATIVE
from .provider import ATTENTION, NORM, activated, reasons_against_attention, reasons_against_layer_norm

_KNOWN_AS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "scaled_dot_product_attention, backward",
    "aten::_scaled_dot_product_attention_math": "scaled_dot_product_attention",
    "aten::_native_multi_head_attention": "multi_head_attention_forward, fast path",
    "aten::native_layer_norm": "layer_norm",
    "aten::native_layer_norm_backward": "layer_norm, backward",
    "aten::rms_norm": "rms_norm",
    "trilby::attention": "scaled_dot_product_attention",
    "trilby::attention_backward": "scaled_dot_product_attention, backward",
    "trilby::norm": "layer_norm or rms_norm",
    "trilby::add_norm": "add_layer_norm or add_rms_norm",
    "trilby::norm_backward": "norm, backward",
}
NOT_ACTIVATED = "trilby is not activated (trilby.kernels.activate())"


@dataclass(frozen=True)
class Explanation:
    """Who computed one call of an operator.

    Attributes:
        function: The function that people call.
        operator: The operator that it came to, as PyTorch's profiler names it.
        inputs: Sizes and dtypes of the tensors.
        served_by: The kernel, in words; it begins with "trilby" or "PyTorch".
        reasons: Every reason why it is not trilby's; none where it is.
    """

    function: str
    operator: str
    inputs: str
    served_by: str
    reasons: tuple[str, ...] = ()

    @property
    def is_trilbys(self) -> bool:
        """Whether trilby computed it."""
        return self.served_by.startswith("trilby")

    def __str__(self) -> str:
        because = f", because {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.function} {self.inputs}: {self.served_by}{because}"


class Explanations(tuple[Explanation, ...]):
    """One for each call of an attention or norm that was met, in order; printed, a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no attention and no norm was called"


def explain(function: Callable[..., Any], *arguments: Any, **options: Any) -> Explanations:
    """Call `function(*arguments, **options)` once, and tell which kernel computed each attention and norm in it.

    Any function will do: `F.scaled_dot_product_attention`, `trilby.kernels.layer_norm`, an nn.Module, a whole model and
    its backward. It is told of things as they are: PyTorch's functions are PyTorch's until `activate`. torch's random
    generator is left as it was. Calls on CPU tensors are seen.

    Returns:
        An `Explanation` for each call; `print` shows a line for each.
    """
    found: list[Explanation] = []
    with torch.random.fork_rng(devices=[]), watched(_Teller(found.append)):
        function(*arguments, **options)
    return Explanations(found)


@contextmanager
def strict() -> Iterator[None]:
    """`activated`, and what would be handed over to PyTorch in this thread raises instead.

    Raises:
        RuntimeError: From within, at an attention or norm that is PyTorch's to compute, with every reason.
    """

    def refuse(call: Call, compute: Callable[[], Any]) -> Any:
        if any(_reasons(call)):
            raise RuntimeError(f"strict: {_explanation(call, False)}")
        return compute()

    with activated(), watched(refuse):
        yield


@dataclass
class _Teller:
    """Tells `heard` of each call that is not a part of another.

    Attributes:
        heard: What is told.
        served: How many calls of trilby's operators were met so far.
        depth: In how many observed calls the present one is.
    """

    heard: Callable[[Explanation], None]
    served: int = 0
    depth: int = 0

    def __call__(self, call: Call, compute: Callable[[], Any]) -> Any:
        before = self._count()
        self.depth += 1
        try:
            result = compute()
        finally:
            self.depth -= 1
        self.served += call.operator.startswith("trilby::")
        if self.depth == 0:
            self.heard(_explanation(call, self._count() > before))
        return result

    def _count(self) -> int:
        return self.served + sum(torch.ops.trilby.served_calls() if NATIVE.loaded else ())


def _explanation(call: Call, is_trilbys: bool) -> Explanation:
    tensors = [value for value in call.arguments.values() if isinstance(value, Tensor)]
    inputs = " ".join(f"{list(tensor.shape)}" for tensor in tensors[:3]) + f" {_dtypes(tensors)}"
    function = _KNOWN_AS[call.operator]
    if is_trilbys:
        return Explanation(function, call.operator, inputs, f"trilby's C++ kernel ({NATIVE.level})")
    return Explanation(function, call.operator, inputs, f"PyTorch's {call.operator}", tuple(_reasons(call)))


def _dtypes(tensors: list[Tensor]) -> str:
    names = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return " and ".join(names)


def _reasons(call: Call) -> Iterator[str]:
    """Every reason of the rule that chose PyTorch."""
    name, arguments = call.operator, call.arguments
    if name.startswith("trilby::"):
        return
    is_norm = "norm" in name
    active = bool((NORM if is_norm else ATTENTION).holders)
    asked = _asked_explicitly()
    if not active and not asked:
        yield NOT_ACTIVATED
    if name == "aten::_native_multi_head_attention":
        yield (
            "PyTorch's fast path for inference computes attention and its projections in one operator; "
            "torch.backends.mha.set_fastpath_enabled(False) leaves attention to trilby"
        )
    elif name == "aten::_scaled_dot_product_attention_math":
        yield from composed.reasons_against_attention(**arguments)
    elif name == "aten::rms_norm":
        yield from composed.reasons_against_rms_norm(**arguments)
    elif not is_norm:
        rule = attention.reasons_for_pytorch if asked and not active else reasons_against_attention
        query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
        yield from rule(query, key, value, mask, arguments["dropout_p"], enable_gqa=True)
    else:
        of_norm = norm.reasons_for_pytorch if asked and not active else reasons_against_layer_norm
        yield from of_norm(*(arguments[name] for name in ("input", "normalized_shape", "weight", "bias")))


def _asked_explicitly() -> bool:
    """Whether the call came by way of trilby's own functions, which need no activation."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__") in (attention.__name__, norm.__name__):
            return True
    return False
