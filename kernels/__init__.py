"""Fused kernels for the two layers that every GPT repeats: causal-softmax attention and layer norm."""

from .attention import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
