"""The kernels for GPUs, in Triton. Importing this package needs triton, touches no device and compiles nothing."""

from .attention import attention, attention_backward

__all__ = ["attention", "attention_backward"]
