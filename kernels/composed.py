"""Attention with dropout or in encoders, and RMS norms, in PyTorch's place: what it composes of others, in one kernel.

PyTorch has no CPU kernel for any: `F.scaled_dot_product_attention` with dropout holds all scores, and so do
`nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in inference; an RMS norm passes over its input several times.
So the operators to override are those that do the composing, in Python: an override costs 5 µs, and what it takes the
place of begins at 60.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import attention, attention_rules, norm
from .attention_arguments import AttentionArguments
from .options import AttentionOptions
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


class ComposedMultiHeadAttention(NamedTuple):
    """A call of `aten::_native_multi_head_attention`, its arguments in order.

    It is what `nn.MultiheadAttention`, and `nn.TransformerEncoderLayer` by way of an operator of its own, run in
    inference: projections and attention in one. C is the width, H · D.

    Attributes:
        query: [B, T, C]; key and value are the same tensor.
        embed_dim: C.
        num_head: H.
        qkv_weight: [3C, C].
        qkv_bias: [3C].
        proj_weight: [C, C].
        proj_bias: [C].
        mask: What is hidden: true, or a number other than 0.
        need_weights: Whether the probabilities are to be returned.
        average_attn_weights: Whether over the heads.
        mask_type: What the mask's sizes are: 0 [T, T], 1 [B, T], 2 [B, H, T, T].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim: int
    num_head: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    mask: Tensor | None = None
    need_weights: bool = True
    average_attn_weights: bool = True
    mask_type: int | None = None

    @property
    def _parameters(self) -> tuple[Tensor, ...]:
        return self.qkv_weight, self.qkv_bias, self.proj_weight, self.proj_bias

    def _mask_size(self) -> tuple[int, ...]:
        B, T, _C = self.query.shape
        return {0: (T, T), 1: (B, T), 2: (B, self.num_head, T, T)}.get(
            -1 if self.mask_type is None else self.mask_type, ()
        )

    def reasons_for_pytorch(self) -> Iterator[str]:
        """The size first: a call that is too small is to lose no time here."""
        query, C, H = self.query, self.embed_dim, self.num_head
        yield from attention_rules.reasons_of_length(query, self.mask is not None)
        if self.need_weights:
            yield "need_weights is True, and trilby's kernels hold no weights"
        if not (query is self.key is self.value):
            yield "query, key and value are not one tensor"
        yield from _reasons_of_tracing(query, self.key, self.value, *self._parameters, self.mask)
        if query.dim() != 3 or query.shape[2] != C or H <= 0 or C % H != 0:
            yield f"query is {list(query.shape)}, not [B, T, {C}] of {H} heads"
            return
        if [list(parameter.shape) for parameter in self._parameters] != [[3 * C, C], [3 * C], [C, C], [C]]:
            yield f"sizes of the parameters are not those of {C} features"
        if any(parameter.dtype != query.dtype for parameter in self._parameters):
            yield "query and parameters are not of one dtype"
        if self.mask is not None and self.mask.shape != self._mask_size():
            yield f"mask is {list(self.mask.shape)}, not {list(self._mask_size())}, for mask_type {self.mask_type}"
        yield from attention_rules.reasons_against_heads(query, H)

    def _seen(self) -> Tensor | None:
        """The mask as trilby has it, [B, H, T, T], true where a key is seen; stored as small as it was."""
        if self.mask is None:
            return None
        B, T, _C = self.query.shape
        mask = self.mask.view(B, 1, 1, T) if self.mask_type == 1 else self.mask
        stored = tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())
        return mask[stored].bool().logical_not().expand(B, self.num_head, T, T)

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """[B, T, C], and None, for the weights are never held.

        A query that sees no key gets the bias alone, as it does in training; from PyTorch's operator a NaN.
        """
        B, T, C = self.query.shape
        # A bias that is added afterwards saves the copy of it to every row, from which PyTorch's product sets out.
        projected = torch.mm(self.query.reshape(B * T, C), self.qkv_weight.t()).add_(self.qkv_bias)
        query, key, value = projected.view(B, T, 3, self.num_head, -1).permute(2, 0, 3, 1, 4)
        options = AttentionOptions(mask=self._seen(), scale=1.0 / math.sqrt(C // self.num_head))
        attended = attention.compute(query, key, value, options)[0]
        return F.linear(attended.transpose(1, 2).reshape(B, T, C), self.proj_weight, self.proj_bias), None


class ComposedRMSNorm(NamedTuple):
    """A call of `aten::rms_norm`, its arguments in order."""

    input: Tensor
    normalized_shape: list[int]
    weight: Tensor | None = None
    eps: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of norms, and those of what is composed."""
        reasons = _reasons_of_tracing(self.input, self.weight)
        return reasons + norm.reasons_for_pytorch(self.input, self.normalized_shape, self.weight)

    def compute(self) -> Tensor:
        """The normalized input."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        normalized: Tensor = torch.ops.trilby.norm(
            self.input, self.weight, None, len(self.normalized_shape), False, eps
        )[0]
        return normalized


KEYS = ("CPU", "AutogradCPU")
ATTENTION: dict[str, type[StandIn]] = {"aten::_scaled_dot_product_attention_math": ComposedAttention}
# This one has a kernel of its own for CPUs, below autograd, which says that it has no gradient.
KEYS_OF_ENCODER = ("CPU",)
ENCODER: dict[str, type[StandIn]] = {"aten::_native_multi_head_attention": ComposedMultiHeadAttention}
NORM: dict[str, type[StandIn]] = {"aten::rms_norm": ComposedRMSNorm}
