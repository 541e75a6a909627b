"""Attention under pytest-benchmark, to save and compare runs with its tools: pytest bench --benchmark-only.

It times one contestant after the other, not in turns: for a ratio to believe, run `python -m trilby.bench`.
"""

import pytest
import torch

from trilby.bench.cases import ATTENTION_CASES, DIRECTIONS, DTYPES
from trilby.bench.contestants import contestants, prepare

SIDES = contestants(compiled=False)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.shape.replace(" ", "-"))
def test_attention_speed(benchmark, case, dtype, direction, side):
    benchmark.group = f"{case.operation} {case.shape} {dtype} {direction}"
    benchmark(prepare(case, getattr(torch, dtype)).call(SIDES[side], direction))
