"""Whether the tests of the Triton kernels can run at all."""

import importlib.util

import pytest
import torch


def test_triton_is_installed():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, so that no test of kernels/gpu can run: pip install triton")


def test_a_gpu_is_here():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the tests of kernels/gpu interpret and compile the kernels, but run them on none")
