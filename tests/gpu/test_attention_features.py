"""Whatever attention is asked for, the Triton kernels compute it as exactly as PyTorch with the scores written out.

The calls are those that the C++ kernels are tested with, smaller, because they are interpreted.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from attention_case import gradients
from attention_features import FEATURES, Call, Inputs, written_out
from tolerance import assert_as_exact_as
from torch import Tensor
from trilby.kernels import reference
from trilby.kernels.gpu.attention_launch import AttentionTiles, DecodeTiles
from trilby.kernels.options import AttentionOptions

RESULTS = "output", "logsumexp", "grad_query", "grad_key", "grad_value"
TILES = AttentionTiles(block_m=32, block_n=32, num_warps=4, num_stages=1)
WIDE = AttentionTiles(block_m=16, block_n=64, num_warps=4, num_stages=1)
SPLIT = DecodeTiles(AttentionTiles(block_m=64, block_n=32, num_warps=4, num_stages=1), split_keys=32)
LONGEST = 60
FEW_QUERIES = 9


def small(call: Call) -> Call:
    """A call of one batch, two heads and two tiles: what is interpreted takes 40 ms a tile, whatever its size."""
    shrink = max(call.T, call.S) / LONGEST
    T, S = math.ceil(call.T / shrink), math.ceil(call.S / shrink)
    lengths = tuple((-(-queries // 3), -(-keys // 3)) for queries, keys in call.lengths if queries < 100)
    if lengths:
        T, S = (sum(of) + 3 for of in zip(*lengths))
    return replace(call, B=1, H=2, Hkv=1, T=T, S=S, D=16, Dv=20, lengths=lengths)


def few(call: Call) -> Call:
    """A call with the queries of one step of decoding, or of a few."""
    lengths = tuple((min(queries, FEW_QUERIES), keys) for queries, keys in call.lengths)
    return replace(call, T=sum(queries for queries, _ in lengths) + 3 if lengths else FEW_QUERIES, lengths=lengths)


@dataclass(frozen=True)
class Judged:
    """A call, and what its results, in the order of `RESULTS`, are judged by."""

    inputs: Inputs
    options: AttentionOptions
    grad_output: Tensor
    truth: tuple[Tensor, ...]
    rival: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> "Judged":
        """A call with random inputs."""
        torch.manual_seed(0)
        inputs, options = call.inputs(dtype), call.ask(call, dtype)
        grad_output = torch.randn(call.B, call.H, call.T, call.Dv).to(dtype)
        exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        output, logsumexp = reference.attention(*exact, *options)
        truth = output, logsumexp, *gradients(output, exact, grad_output)
        theirs = written_out(inputs, call, options)
        rounded = reference.attention(*(tensor.detach().float() for tensor in inputs), *options)[1]
        rival = theirs, rounded, *gradients(theirs, inputs, grad_output)
        return cls(tuple(tensor.detach() for tensor in inputs), options, grad_output, truth, rival)

    def results(self, kernels, tiles) -> tuple[Tensor, ...]:
        """What the kernels compute."""
        output, logsumexp = kernels.attention(*self.inputs, *self.options, tiles=tiles)
        return (
            output,
            logsumexp,
            *kernels.attention_backward(self.grad_output, *self.inputs, output, logsumexp, *self.options, tiles=tiles),
        )

    def judge(self, *results: Tensor) -> None:
        """Of the results that are given each must obey the rule of `tolerance`."""
        for name, mine, rival, truth in zip(RESULTS, results, self.rival, self.truth):
            assert_as_exact_as(mine, rival, truth, name)


@lru_cache
def judged(name: str, dtype: torch.dtype = torch.float32) -> Judged:
    return Judged.of(small(FEATURES[name]), dtype)


@pytest.mark.parametrize("name", FEATURES)
def test_as_exact_as_pytorch_with_scores_written_out(kernels, name):
    one = judged(name)
    results = one.results(kernels, TILES)
    # Of one key the gradients are 0 but for rounding, which test_attention_backward.py bounds.
    one.judge(*results[:2] if name == "window of one key" else results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "packed, everything"])
def test_half_precision(kernels, name, dtype):
    one = judged(name, dtype)
    one.judge(*one.results(kernels, WIDE))


@pytest.mark.parametrize("name", FEATURES)
def test_a_few_queries_and_split_keys(kernels, name):
    one = Judged.of(few(small(FEATURES[name])), torch.float32)
    one.judge(*kernels.attention(*one.inputs, *one.options, tiles=SPLIT))
