"""Attention with dropout and RMS norms, in PyTorch's place: what it composes of others, in one kernel.

PyTorch has no CPU kernel for either: `F.scaled_dot_product_attention` with dropout holds all scores, and an RMS norm
passes over its input several times. So the operators to override are those that do the composing, in Python: an
override costs 5 µs, and what it takes the place of begins at 60.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import attention
from .attention_arguments import AttentionArguments
from .norm_rules import COMPOSED_RMS_NORM, reasons_for_pytorch
from .override import StandIn


def _reasons_of_tracing(*tensors: Tensor | None) -> tuple[str, ...]:
    """Why PyTorch has to see what it composes: it traces, or a mode or a class of tensors is to hear of every step."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return ("a mode of torch.utils._python_dispatch is active",)
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, Parameter):
            return (f"a tensor is a {type(tensor).__name__}",)
    return ()


class ComposedAttention(NamedTuple):
    """A call of `aten::_scaled_dot_product_attention_math`, its arguments in order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    dropout_mask: Tensor | None = None
    scale: float | None = None
    enable_gqa: bool = False

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of attention, and those of what is composed."""
        reasons = _reasons_of_tracing(self.query, self.key, self.value, self.attn_mask)
        if not torch.backends.cuda.flash_sdp_enabled():  # it is the switch of CPUs, too
            reasons += ("torch.nn.attention.sdpa_kernel rules out flash attention",)
        if self.dropout_mask is not None:
            reasons += ("dropout_mask is given",)
        return reasons + attention.reasons_for_pytorch(self._asked)

    @property
    def _asked(self) -> AttentionArguments:
        return AttentionArguments(*self[:6], self.scale, self.enable_gqa)

    def compute(self) -> tuple[Tensor, Tensor]:
        """PyTorch's function uses the first result alone. The second, all weights, is held by nobody: it is empty."""
        output = attention.compute(self.query, self.key, self.value, self._asked.options())[0]
        return output, self.query.new_empty(0)


class ComposedRMSNorm(NamedTuple):
    """A call of `aten::rms_norm`, its arguments in order."""

    input: Tensor
    normalized_shape: list[int]
    weight: Tensor | None = None
    eps: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of norms, and those of what is composed."""
        reasons = _reasons_of_tracing(self.input, self.weight)
        return reasons + reasons_for_pytorch(COMPOSED_RMS_NORM, self.input, self.normalized_shape, self.weight)

    def compute(self) -> Tensor:
        """The normalized input."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        normalized: Tensor = torch.ops.trilby.norm(
            self.input, self.weight, None, len(self.normalized_shape), False, eps
        )[0]
        return normalized


KEYS = ("CPU", "AutogradCPU")
ATTENTION: dict[str, type[StandIn]] = {"aten::_scaled_dot_product_attention_math": ComposedAttention}
NORM: dict[str, type[StandIn]] = {"aten::rms_norm": ComposedRMSNorm}
