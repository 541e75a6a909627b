"""What each operator means, in plain PyTorch at any precision: the specification, and the oracle of the tests.

Nothing here is fast, and nothing here is fused: scores are written out, one expression says one thing. Half precision
inputs are computed with in float32 and rounded once at the end, so that in float64 this is the truth to compare with.
"""

from ..options import AttentionOptions
from .attention import attention, attention_backward, attention_output, visible
from .blocks import decode_blocks
from .gelu import gelu, gelu_backward
from .linear import linear
from .norm import add_norm, norm, norm_backward, statistics
from .random import attention_dropout_factors, dropout_factors, random_words

__all__ = [
    "AttentionOptions",
    "add_norm",
    "attention",
    "attention_backward",
    "attention_dropout_factors",
    "attention_output",
    "decode_blocks",
    "dropout_factors",
    "gelu",
    "gelu_backward",
    "linear",
    "norm",
    "norm_backward",
    "random_words",
    "statistics",
    "visible",
]
