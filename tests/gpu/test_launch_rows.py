"""The launch parameters that users get, on the GPU that is here; elsewhere they are only compiled (test_compile.py)."""

from dataclasses import replace

import pytest
import torch
from attention_features import FEATURES, Judged
from gpu.conftest import Device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: test_triton.py says so")

# What has code of its own: plain scores of a causal mask and of a window, and rich ones, of a few queries and of many.
NAMES = ("causal, lower right", "window, lower right", "dropout", "everything", "packed, everything")
LENGTHS = {"many queries": (200, 333), "a few queries": (40, 333), "a token": (1, 900)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_pytorch_with_scores_written_out(name, D, dtype, lengths):
    torch.manual_seed(0)
    T, S = LENGTHS[lengths]
    call = FEATURES[name]
    packed = tuple((min(T, queries), keys) for queries, keys in call.lengths)
    sizes = (sum(of) + 3 for of in zip(*packed)) if packed else (T, S)
    one = Judged.of(replace(call, **dict(zip("TS", sizes)), D=D, Dv=D, lengths=packed), dtype)
    kernels, inputs = Device(), tuple(tensor.detach() for tensor in one.inputs)
    output, logsumexp = kernels.attention(*inputs, *one.options)
    if T == 1:  # one query is no training, and where it sees one key its gradients are 0 but for rounding
        one.judge(output, logsumexp)
    else:
        gradients = kernels.attention_backward(one.grad_output, *inputs, output, logsumexp, *one.options)
        one.judge(output, logsumexp, *gradients)
