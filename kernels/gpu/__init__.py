"""The kernels for GPUs, in Triton. Importing this package needs triton, touches no device and compiles nothing."""

from .attention import attention, attention_backward
from .norm import add_norm, norm, norm_backward
from .repeat import count_repeatable, forget

__all__ = ["add_norm", "attention", "attention_backward", "count_repeatable", "forget", "norm", "norm_backward"]
