"""Attention with dropout and RMS norms in PyTorch's place: operators that PyTorch composes of others, in one kernel.

PyTorch has no CPU kernel for either: `F.scaled_dot_product_attention` with dropout holds all scores, and an RMS norm
passes over its input several times. So the operators to override are those that do the composing, in Python: an
override costs 5 µs, and what it takes the place of begins at 60.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel
from torch.nn import Parameter

from . import attention, norm
from .options import UNBOUNDED, AttentionOptions
from .seed import draw_seed

_KEYS = ("CPU", "AutogradCPU")


def _reasons_against(*tensors: Tensor | None) -> tuple[str, ...]:
    """Why PyTorch has to see what it composes: it traces, or a mode or a class of tensors is to hear of every step."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return ("a mode of torch.utils._python_dispatch is active",)
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, Parameter):
            return (f"a tensor is a {type(tensor).__name__}",)
    return ()


def reasons_against_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[str, ...]:
    """Every reason why `aten::_scaled_dot_product_attention_math` stays PyTorch's.

    With dropout no call is too small. Measured on one thread, PyTorch's time over trilby's, forward (and with the
    backward): 1.5 (1.3) at B·H·T·D = 1·4·16·32 in float32 and 1.7 (1.5) in bfloat16, 5 (2.4) at 2·4·64·32, 8 (3.7) at
    2·6·256·64. Without, it is the limits of flash attention that hold.
    """
    reasons: list[str] = []
    if not torch.backends.cuda.flash_sdp_enabled():  # it is the switch of CPUs, too
        reasons.append("torch.nn.attention.sdpa_kernel rules out flash attention")
    if dropout_mask is not None:
        reasons.append("dropout_mask is given")
    if attn_mask is not None and is_causal:
        reasons.append("attn_mask and is_causal are both given")
    if not 0.0 <= dropout_p <= 1.0:
        reasons.append(f"dropout_p is {dropout_p}")
    if attn_mask is not None:
        reasons += reasons_against_mask(query, key, attn_mask)
        if attn_mask.requires_grad and torch.is_grad_enabled():
            reasons.append("attn_mask requires a gradient")
    reasons += _reasons_against(query, key, value, attn_mask)
    rule = attention.reasons_for_kernel if dropout_p > 0.0 else attention.reasons_for_pytorch
    return *reasons, *rule(query, key, value, enable_gqa=enable_gqa)


def reasons_against_mask(query: Tensor, key: Tensor, mask: Tensor) -> Iterator[str]:
    """Why no kernel of trilby's can add `mask` to the scores."""
    if mask.dtype not in (torch.float32, query.dtype):
        yield f"attn_mask is {mask.dtype}, not torch.float32 or {query.dtype}"
    if query.dim() == key.dim() == 4:
        size = (*query.shape[:3], key.shape[2])
        if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(size))):
            yield f"attn_mask is {list(mask.shape)}, which does not spread over {list(size)}"


def reasons_against_rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[str, ...]:
    """Every reason why `aten::rms_norm` stays PyTorch's."""
    return *_reasons_against(input, weight), *norm.reasons_for_pytorch(input, normalized_shape, weight)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """PyTorch's function uses the first result alone. The second, all weights, is held by nobody: it is empty."""
    size = (*query.shape[:3], key.shape[2])
    options = AttentionOptions(
        mask=None if attn_mask is None else attn_mask.expand(size),
        seed=draw_seed(dropout_p, query.device),
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        window_right=0 if is_causal else UNBOUNDED,
        dropout_p=dropout_p,
    )
    return attention.compute(query, key, value, options)[0], query.new_empty(0)


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    normalized: Tensor = torch.ops.trilby.norm(input, weight, None, len(normalized_shape), False, eps)[0]
    return normalized


def _override(operator: str, reasons: Callable[..., tuple[str, ...]], compute: Callable[..., Any]) -> Library:
    """Put `compute` in the place of PyTorch's kernel where there are no `reasons` against it."""
    library = Library("aten", "IMPL")
    for key, below in [(key, get_kernel(f"aten::{operator}", key)) for key in _KEYS]:

        def call(keys: torch._C.DispatchKeySet, *given: Any, _below: Any = below, **named: Any) -> Any:
            if reasons(*given, **named):
                return _below.call_boxed(keys, *given, **named)
            return compute(*given, **named)

        library.impl(operator, call, key, with_keyset=True)
    return library


def override_attention() -> Library:
    """`aten::_scaled_dot_product_attention_math`, until the library is destroyed."""
    return _override("_scaled_dot_product_attention_math", reasons_against_attention, _attention)


def override_rms_norm() -> Library:
    """`aten::rms_norm`, until the library is destroyed."""
    return _override("rms_norm", reasons_against_rms_norm, _rms_norm)
