"""Attention under pytest-benchmark, to save and compare runs with its tools: pytest bench --benchmark-only.

It times one contestant after the other, not in turns: for a ratio to believe, run `python -m trilby.bench`.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from trilby.bench.cases import ATTENTION_CASES, DTYPES, AttentionCase, Direction, VarlenCase
from trilby.bench.contestants import contestants, prepare

SIDES = contestants(compiled=False)
TIMED = [
    pytest.param(case, direction, id=f"{case.operation}-{case.shape}-{direction}".replace(" ", "-"))
    for case in ATTENTION_CASES
    for direction in case.directions
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "direction"), TIMED)
def test_attention_speed(
    benchmark: BenchmarkFixture, case: AttentionCase | VarlenCase, dtype: str, direction: Direction, side: str
) -> None:
    benchmark.group = f"{case.operation} {case.shape} {dtype} {direction}"
    benchmark(prepare(case, getattr(torch, dtype)).call(SIDES[side], direction))
