"""Attention of encoders in inference: why a call of PyTorch's one operator for it stays PyTorch's.

The kernel in its place, csrc/bindings_encoder.cpp, goes by the same rules; `explain` and `strict` ask here. No call is
too small or too large for it. Measured on one thread of a Zen 4, projections included, PyTorch's time over trilby's:

    B, T, H, D               float32   with weights   bfloat16   with weights   float16   with weights
    1, 1, 2, 16                 1.08           1.21       1.05           1.19      1.06           1.24
    1, 16, 4, 32                1.12           1.21       1.33           1.46      1.21           1.21
    8, 16, 4, 32                1.10           1.07       1.27           1.28      1.20           1.19
    1, 64, 6, 64                1.05           1.01       1.11           1.09      1.26           1.25
    8, 64, 4, 32                1.14           1.06       1.26           1.21      1.58           1.53
    1, 128, 6, 64               1.07           1.02       1.11           1.07      1.51           1.47
    1, 256, 6, 64               1.13           0.99       1.13           1.02      2.02           1.94
    1, 512, 6, 64               1.19           1.01       1.21           1.01      3.17           2.97

With a mask of padding 1.01 to 1.85, 1.02 to 3.99 and 1.03 to 4.01. A call that is handed on takes 5 % more, 12 µs
at least.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from . import attention_rules

OPERATOR = "aten::_native_multi_head_attention"


class EncoderAttention(NamedTuple):
    """A call of the operator, its arguments in order.

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
        mask: What is hidden: true, or a number other than 0. A query that sees no key gets the bias alone, as it does
            in training; from PyTorch's operator a NaN.
        need_weights: Whether the probabilities are to be returned; of a query that sees no key they are 0.
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

    def _is_of_one_tensor(self) -> bool:
        return all(
            (other.data_ptr(), other.shape, other.stride())
            == (self.query.data_ptr(), self.query.shape, self.query.stride())
            for other in (self.key, self.value)
        )

    def reasons_for_pytorch(self) -> Iterator[str]:
        """Every reason; none: trilby computes it."""
        query, C, H = self.query, self.embed_dim, self.num_head
        if not self._is_of_one_tensor():
            yield "query, key and value are not one tensor"
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
