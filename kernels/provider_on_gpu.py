"""trilby in PyTorch's place on GPUs: its Triton kernels as PyTorch's operators of attention and layer norm.

Thin: a call's arguments and results are put into the shape that the trilby:: operators have, which compute it. Strides,
sizes and dtypes are those that PyTorch's own fake kernels promise to `torch.compile`. The dispatch key CUDA is that of
AMD's GPUs, too. No GPU has run this yet: tests enter these kernels with tensors of a CPU.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_rules, norm_rules
from .attention_arguments import AttentionArguments
from .options import AttentionOptions
from .override import StandIn


def _like(result: Tensor, like: Tensor) -> Tensor:
    """`result` with the strides of `torch.empty_like(like)`: itself, where heads lie inside as models leave them."""
    wanted = torch.empty_like(like, device="meta")
    return result if result.stride() == wanted.stride() else torch.empty_like(like).copy_(result)


def _options(query: Tensor, is_causal: bool, scale: float | None) -> AttentionOptions:
    return AttentionOptions.plain(is_causal, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)


def _gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.trilby.attention_backward(
        grad_output, query, key, value, output, logsumexp, *options
    )
    return gradients


class FlashAttention(NamedTuple):
    """A call of `aten::_scaled_dot_product_flash_attention`, its arguments in order."""

    query: Tensor
    key: Tensor
    value: Tensor
    dropout_p: float = 0.0
    is_causal: bool = False
    return_debug_mask: bool = False
    scale: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of attention."""
        reasons = ("return_debug_mask is given",) if self.return_debug_mask else ()
        call = AttentionArguments(*self[:3], None, self.dropout_p, self.is_causal, enable_gqa=True).call
        return reasons + attention_rules.reasons_for_pytorch(call)

    def compute(self) -> tuple[Any, ...]:
        """Output and logsumexp; of what else PyTorch's returns, the lengths. Nothing is drawn, so there is no seed."""
        query, key, value = self[:3]
        options = _options(query, self.is_causal, self.scale)
        output, logsumexp = torch.ops.trilby.attention(query, key, value, *options)
        if torch.version.hip:
            seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
        else:
            seed, offset = (query.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))
        absent = query.new_empty(0)
        return _like(output, query), logsumexp, None, None, query.shape[2], key.shape[2], seed, offset, absent


class FlashAttentionBackward(NamedTuple):
    """A call of `aten::_scaled_dot_product_flash_attention_backward`, its arguments in order."""

    grad_out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    logsumexp: Tensor
    cum_seq_q: Tensor | None
    cum_seq_k: Tensor | None
    max_q: int
    max_k: int
    dropout_p: float
    is_causal: bool
    philox_seed: Tensor
    philox_offset: Tensor
    scale: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of attention; whose the forward was is no matter."""
        inputs = (self.query, self.key, self.value)
        call = AttentionArguments(*inputs, None, self.dropout_p, self.is_causal, enable_gqa=True).call
        return attention_rules.reasons_for_pytorch(call._replace(trains=True))

    def compute(self) -> tuple[Tensor, ...]:
        """The gradients of query, key and value."""
        inputs = (self.query, self.key, self.value)
        options = _options(self.query, self.is_causal, self.scale)
        gradients = _gradients(self.grad_out, *inputs, self.out, self.logsumexp, *options)
        return tuple(_like(gradient, of) for gradient, of in zip(gradients, inputs))


class EfficientAttention(NamedTuple):
    """A call of `aten::_scaled_dot_product_efficient_attention`, its arguments in order: PyTorch's for float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | None
    compute_log_sumexp: bool
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of attention."""
        call = AttentionArguments(*self[:3], self.attn_bias, self.dropout_p, self.is_causal, enable_gqa=True).call
        return attention_rules.reasons_for_pytorch(call)

    def compute(self) -> tuple[Tensor, ...]:
        """Output and, if asked for, the logsumexp, with as many rows to a head as PyTorch's has."""
        query, key, value = self[:3]
        options = _options(query, self.is_causal, self.scale)
        output, logsumexp = torch.ops.trilby.attention(query, key, value, *options)
        B, H, T = logsumexp.shape
        rows = (T if torch.version.hip else -(-T // 32) * 32) if self.compute_log_sumexp else 0
        kept = logsumexp if rows == T else logsumexp.new_full((B, H, rows), math.inf)
        if 0 < T < rows:
            kept[..., :T] = logsumexp
        seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
        return output, kept, seed, offset


class EfficientAttentionBackward(NamedTuple):
    """A call of `aten::_scaled_dot_product_efficient_attention_backward`, its arguments in order."""

    grad_out_: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | None
    out: Tensor
    logsumexp: Tensor
    philox_seed: Tensor
    philox_offset: Tensor
    dropout_p: float
    grad_input_mask: list[bool]
    is_causal: bool = False
    scale: float | None = None

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of attention; whose the forward was is no matter."""
        inputs = (self.query, self.key, self.value)
        call = AttentionArguments(*inputs, self.attn_bias, self.dropout_p, self.is_causal, enable_gqa=True).call
        return attention_rules.reasons_for_pytorch(call._replace(trains=True))

    def compute(self) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value; there is no bias."""
        options = _options(self.query, self.is_causal, self.scale)
        logsumexp = self.logsumexp[..., : self.query.shape[2]].contiguous()
        return *_gradients(self.grad_out_, self.query, self.key, self.value, self.out, logsumexp, *options), None


def _reasons_against_layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[str, ...]:
    """Those of norms; and PyTorch's kernel refuses parameters of another dtype than input's."""
    others = {str(p.dtype) for p in (weight, bias) if p is not None and p.dtype != input.dtype}
    reasons = tuple(f"weight or bias is {dtype}, and input {input.dtype}" for dtype in sorted(others))
    return reasons + norm_rules.reasons_against_kernel(input, normalized_shape, weight, bias)


class LayerNorm(NamedTuple):
    """A call of `aten::native_layer_norm`, its arguments in order."""

    input: Tensor
    normalized_shape: list[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of norms."""
        return _reasons_against_layer_norm(*self[:4])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """The normalized input, and mean and rstd as PyTorch keeps them: with sizes of 1 for the row."""
        dims = len(self.normalized_shape)
        normalized, mean, rstd = torch.ops.trilby.norm(self.input, self.weight, self.bias, dims, True, self.eps)
        kept = (*mean.shape, *(1,) * dims)
        return normalized, mean.view(kept), rstd.view(kept)


class LayerNormBackward(NamedTuple):
    """A call of `aten::native_layer_norm_backward`, its arguments in order."""

    grad_out: Tensor
    input: Tensor
    normalized_shape: list[int]
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    output_mask: list[bool]

    def reasons_for_pytorch(self) -> tuple[str, ...]:
        """Those of norms; whose the forward was is no matter."""
        return _reasons_against_layer_norm(self.input, self.normalized_shape, self.weight, self.bias)

    def compute(self) -> tuple[Tensor | None, ...]:
        """The gradients that `output_mask` asks for, of input, weight and bias."""
        dims = len(self.normalized_shape)
        leading = self.input.shape[: self.input.dim() - dims]
        of_input, _, of_weight, of_bias = torch.ops.trilby.norm_backward(
            self.grad_out, None, self.input, self.mean.reshape(leading), self.rstd.reshape(leading), self.weight,
            self.bias, None, dims, True, 0.0,
        )  # fmt: skip
        return tuple(g if wanted else None for g, wanted in zip((of_input, of_weight, of_bias), self.output_mask))


KEYS = ("CUDA",)
ATTENTION: dict[str, type[StandIn]] = {
    "aten::_scaled_dot_product_flash_attention": FlashAttention,
    "aten::_scaled_dot_product_flash_attention_backward": FlashAttentionBackward,
    "aten::_scaled_dot_product_efficient_attention": EfficientAttention,
    "aten::_scaled_dot_product_efficient_attention_backward": EfficientAttentionBackward,
}
NORM: dict[str, type[StandIn]] = {
    "aten::native_layer_norm": LayerNorm,
    "aten::native_layer_norm_backward": LayerNormBackward,
}
