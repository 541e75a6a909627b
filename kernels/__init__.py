"""Fused kernels for the two layers that every GPT repeats: causal-softmax attention and layer norm."""

from .activation import gelu
from .attention import attend, scaled_dot_product_attention
from .blocks import Affine, BlockWeights, DecoderWeights, decode_blocks
from .explain import explain, strict
from .linear import QuantizedWeight, linear, quantize_rows
from .memory import keep_memory
from .norm import LayerNorm, RMSNorm, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .provider import activate, activated, restore
from .varlen import varlen_attn
from .wide_product import BFLOAT16_IS_SLOW

__all__ = [
    "BFLOAT16_IS_SLOW",
    "Affine",
    "BlockWeights",
    "DecoderWeights",
    "LayerNorm",
    "QuantizedWeight",
    "RMSNorm",
    "activate",
    "activated",
    "add_layer_norm",
    "add_rms_norm",
    "attend",
    "decode_blocks",
    "explain",
    "gelu",
    "keep_memory",
    "layer_norm",
    "linear",
    "quantize_rows",
    "restore",
    "rms_norm",
    "scaled_dot_product_attention",
    "strict",
    "varlen_attn",
]
