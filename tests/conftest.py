"""Fixtures that every folder of tests shares."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trilby.kernels import composed, norm, norm_rules
from trilby.kernels.ops import NATIVE

# Run from the repository, `kernels` would be our folder to transformers, which looks for a package of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]


@pytest.fixture(params=NATIVE.levels or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level of the C++ extension that this machine can run, one after the other."""
    if not NATIVE.loaded:
        pytest.skip(f"no C++ kernels to test: {NATIVE.reason}")
    before = NATIVE.level
    NATIVE.use_level(request.param)
    yield request.param
    NATIVE.use_level(before)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends norms to trilby's kernels that PyTorch would be faster for."""

    def at_least(narrowest: int) -> norm_rules.Limits:
        return norm_rules.Limits(dict.fromkeys(norm_rules.KERNEL_DTYPES, 1), narrowest)

    for limits in ("LAYER_NORM", "RMS_NORM", "ADD_LAYER_NORM", "ADD_RMS_NORM", "WITH_DROPOUT"):
        monkeypatch.setattr(norm, limits, at_least(1))
    # Of rows of one element, PyTorch rounds the gradient its own way.
    monkeypatch.setattr(composed, "COMPOSED_RMS_NORM", at_least(2))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
