"""The kernels for GPUs, in Triton. Importing this package needs triton, touches no device and compiles nothing."""

from .attention import attention, attention_backward
from .norm import add_norm, norm, norm_backward

__all__ = ["add_norm", "attention", "attention_backward", "norm", "norm_backward"]
