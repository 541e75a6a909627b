"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest
from trilby.kernels import restore


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """No test leaves trilby in PyTorch's place."""
    yield
    restore()
