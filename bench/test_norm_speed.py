"""Layer norm, alone and after the residual add, under pytest-benchmark: pytest bench --benchmark-only.

It times one contestant after the other, not in turns: for a ratio to believe, run `python -m trilby.bench`.
"""

import pytest
import torch

from trilby.bench.cases import DIRECTIONS, DTYPES, NORM_CASES
from trilby.bench.contestants import contestants, prepare

SIDES = contestants(compiled=False)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: f"{case.operation}-{case.shape}")
def test_norm_speed(benchmark, case, dtype, direction, side):
    benchmark.group = f"{case.operation} {case.shape} {dtype} {direction}"
    benchmark(prepare(case, getattr(torch, dtype)).call(SIDES[side], direction))
