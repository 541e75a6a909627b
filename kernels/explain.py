"""Who computes: `explain` tells which kernel a call runs, and why; `strict` raises where it would be PyTorch's.

Both see the calls as PyTorch's dispatcher does, in any function, and say what was run: the C++ kernels count their
calls, and the reasons are those of the rules that chose.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention_rules, composed, encoder, provider_on_gpu
from .attention_arguments import AttentionArguments
from .observer import Call, watched
from .ops import NATIVE
from .provider import ATTENTION, NORM, activated, reasons_against_layer_norm

_KNOWN_AS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "scaled_dot_product_attention, backward",
    "aten::_scaled_dot_product_attention_math": "scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_backward": "scaled_dot_product_attention, backward",
    "aten::_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "aten::_scaled_dot_product_efficient_attention_backward": "scaled_dot_product_attention, backward",
    "aten::_native_multi_head_attention": "multi_head_attention_forward, fast path",
    "aten::native_layer_norm": "layer_norm",
    "aten::native_layer_norm_backward": "layer_norm, backward",
    "aten::rms_norm": "rms_norm",
    "trilby::attention": "scaled_dot_product_attention or attend",
    "trilby::attention_output": "scaled_dot_product_attention or attend",
    "trilby::attention_backward": "scaled_dot_product_attention or attend, backward",
    "trilby::norm": "layer_norm or rms_norm",
    "trilby::add_norm": "add_layer_norm or add_rms_norm",
    "trilby::norm_backward": "norm, backward",
    "trilby::linear": "linear",
    "trilby::decode_blocks": "decode_blocks",
    "trilby::gelu": "gelu",
    "trilby::gelu_backward": "gelu, backward",
    "aten::linear": "linear",
    "aten::gelu": "gelu",
}
# What `activate` leaves as it is: only trilby's own functions tell of it.
_NEVER_OVERRIDDEN = ("aten::linear", "aten::gelu")
_LAYER_NORM = ("aten::native_layer_norm", "aten::native_layer_norm_backward")
_ON_CPU: dict[str, Callable[..., Any]] = {
    **composed.ATTENTION,
    **composed.NORM,
    encoder.OPERATOR: encoder.EncoderAttention,
}
_ON_GPU = provider_on_gpu.ATTENTION | provider_on_gpu.NORM
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
    """One for each call of an attention or norm, or of another function of trilby's, in order; printed, a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no attention, norm or other function of trilby's was called"


def explain(function: Callable[..., Any], *arguments: Any, **options: Any) -> Explanations:
    """Call `function(*arguments, **options)` once, and tell which kernel computed each attention and norm in it.

    Any function will do: `F.scaled_dot_product_attention`, `trilby.kernels.layer_norm`, an nn.Module, a whole model and
    its backward. It is told of things as they are: PyTorch's functions are PyTorch's until `activate`. So it is of
    `trilby.kernels.linear` and `gelu`; PyTorch's, which `activate` leaves alone, are not told of. torch's random
    generator is left as it was. Calls on CPUs and GPUs are seen.

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
        self.served += call.operator.startswith("trilby::") and not call.handed_over
        if self.depth == 0:
            self.heard(_explanation(call, self._count() > before))
        return result

    def _count(self) -> int:
        return self.served + sum(torch.ops.trilby.served_calls() if NATIVE.loaded else ())


def _explanation(call: Call, is_trilbys: bool) -> Explanation:
    tensors = [value for value in call.arguments.values() if isinstance(value, Tensor)]
    inputs = " ".join(f"{list(tensor.shape)}" for tensor in tensors[:3]) + f" {_dtypes(tensors)}"
    function = _KNOWN_AS[call.operator]
    if call.arguments.get("query_starts") is not None:
        function = function.replace("scaled_dot_product_attention or attend", "varlen_attn")
    if is_trilbys:
        kernel = "trilby's Triton kernel" if call.device == "cuda" else f"trilby's C++ kernel ({NATIVE.level})"
        return Explanation(function, call.operator, inputs, kernel)
    kernel = "PyTorch's operators, one by one" if call.operator.startswith("trilby::") else f"PyTorch's {call.operator}"
    return Explanation(function, call.operator, inputs, kernel, tuple(_reasons(call)))


def _dtypes(tensors: list[Tensor]) -> str:
    names = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return " and ".join(names)


def _reasons(call: Call) -> Iterator[str]:
    """Every reason of the rule that chose PyTorch."""
    name, arguments = call.operator, call.arguments
    active = bool((NORM if "norm" in name else ATTENTION).holders)
    if call.handed_over and not active:
        yield from call.handed_over
        return
    if name.startswith("trilby::") or name in _NEVER_OVERRIDDEN:
        yield from call.handed_over
        return
    if not active:
        yield NOT_ACTIVATED
    if name in _ON_CPU and call.device == "cpu":
        yield from _ON_CPU[name](**arguments).reasons_for_pytorch()
    elif call.device == "cuda":
        yield from _ON_GPU[name](**arguments).reasons_for_pytorch()
    elif name in _LAYER_NORM:
        yield from reasons_against_layer_norm(*(arguments[n] for n in ("input", "normalized_shape", "weight", "bias")))
    else:
        yield from _reasons_against_flash_attention(name, arguments)


def _reasons_against_flash_attention(name: str, arguments: dict[str, Any]) -> Iterator[str]:
    """As the C++ kernels go by."""
    mask = arguments["attn_mask"]
    if mask is not None and mask.dim() not in (2, 4):
        yield f"attn_mask is {list(mask.shape)}, and PyTorch's operator takes 2 or 4 dimensions"
    if arguments["dropout_p"] != 0.0:
        yield f"dropout_p is {arguments['dropout_p']}, and PyTorch's operator drops nothing"
    inputs = (arguments["query"], arguments["key"], arguments["value"])
    call = AttentionArguments(*inputs, mask, enable_gqa=True).call
    yield from attention_rules.reasons_for_pytorch(
        call._replace(trains="backward" in name or torch.is_grad_enabled(), in_place=True)
    )
