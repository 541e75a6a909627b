"""Who else is timed on a GPU: PyTorch's attention backends one by one, and packages that are installed.

Each is called as its own documentation says, and no further tuned.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .functions import PYTORCH, Functions

BACKENDS = {
    "PyTorch flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "PyTorch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_ATTENTION = "flash-attn"
LIGER = "Liger"
APEX = "Apex"


def rivals(operation: str) -> dict[str, Functions]:
    """Those that compute "attention", "layer_norm" or "add_layer_norm", by name; the other functions are PyTorch's."""
    if operation == "attention":
        found = {name: _attention(_backend(backend)) for name, backend in BACKENDS.items()}
        return found | ({FLASH_ATTENTION: _attention(_flash_attention)} if _has("flash_attn") else {})
    found = {}
    if _has("liger_kernel"):
        found[LIGER] = _norm(_liger)
    if _has("apex"):
        found[APEX] = _norm(_apex)
    if _has("flash_attn") and operation == "add_layer_norm":
        found[FLASH_ATTENTION] = replace(PYTORCH, add_layer_norm=_flash_add_layer_norm)
    return found


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _attention(function: Callable[..., Tensor]) -> Functions:
    return replace(PYTORCH, attention=function)


def _norm(layer_norm: Callable[..., Tensor]) -> Functions:
    def add_layer_norm(
        stream: Tensor, branch: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        summed = stream + branch
        return layer_norm(summed, normalized_shape, weight, bias, eps), summed

    return replace(PYTORCH, layer_norm=layer_norm, add_layer_norm=add_layer_norm)


def _backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, is_causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=is_causal)

    return attention


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, is_causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, T, H, D]
    output: Tensor = flash_attn_func(*turned, dropout_p=dropout_p, causal=is_causal)
    return output.transpose(1, 2)


def _flash_add_layer_norm(
    stream: Tensor, branch: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    normalized, summed = layer_norm_fn(branch, weight, bias, residual=stream, eps=eps, prenorm=True)
    return normalized, summed


def _liger(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops import LigerLayerNormFunction

    output: Tensor = LigerLayerNormFunction.apply(input, weight, bias, eps)
    return output


def _apex(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    output: Tensor = fused_layer_norm_affine(input, weight, bias, normalized_shape, eps)
    return output
