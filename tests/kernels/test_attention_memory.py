"""Attention takes memory in proportion to its length: measured, not claimed."""

import subprocess
import sys

import pytest
from attention_case import needs_extension

GROWTH = """
import resource, sys, torch
import trilby.kernels
from trilby.kernels.options import AttentionOptions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(T, options):
    inputs = [torch.randn(1, 1, T, D).requires_grad_() for _ in range(3)]
    grad_output = torch.randn(1, 1, T, D)
    before = peak()
    output = torch.ops.trilby.attention(*inputs, *options)[0]
    gradients = torch.autograd.grad(output, inputs, grad_output)
    return peak() - before

D = 32
torch.set_num_threads(2)
options = AttentionOptions(scale=0.2, window_right=0, seed=torch.tensor([1]), dropout_p=0.1)
run(64, options)
print(*(run(T, options) for T in (1024, 4096, 16384, 32768)))
"""
# Output, three gradients and logsumexp, and what two threads hold of keys and values for gradients: 8 MiB each, and as
# much again for all else, that of the allocator included.
SCRATCH = 2 * 2 * 8 * 2**20


@needs_extension
@pytest.mark.slow
def test_peak_memory_grows_with_the_length() -> None:
    """At 32768 queries the scores of one head alone would take 4 GiB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    for T, growth in zip((1024, 4096, 16384, 32768), map(int, done.stdout.split())):
        results = 4 * T * (4 * 32 + 1)
        assert growth <= results + SCRATCH, f"T = {T}: {growth} bytes, of which results {results}"
