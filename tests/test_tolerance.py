"""The rule that judges every kernel must itself be able to fail."""

import pytest
import torch
from tolerance import assert_as_exact_as, error, floor

TRUTH = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def off_by(amount: float) -> torch.Tensor:
    """The truth with an error of `amount` in one place."""
    return (TRUTH + torch.tensor([0.0, amount, 0.0])).float()


def test_twice_the_rivals_error_passes_and_more_fails() -> None:
    assert_as_exact_as(off_by(0.2), off_by(0.1), TRUTH, "twice")
    with pytest.raises(AssertionError, match=r"thrice: error 3.000e-01, rival's 1.000e-01, allowed 2.000e-01"):
        assert_as_exact_as(off_by(0.3), off_by(0.1), TRUTH, "thrice")


def test_beside_an_exact_rival_rounding_passes_and_more_fails() -> None:
    exact = TRUTH.float()
    assert_as_exact_as(off_by(1e-6), exact, TRUTH, "four roundings of float32")
    with pytest.raises(AssertionError):
        assert_as_exact_as(off_by(1e-5), exact, TRUTH, "forty")


def test_a_nan_or_an_infinity_out_of_place_is_an_infinite_error() -> None:
    bad = TRUTH.clone()
    for value in (torch.nan, torch.inf, -torch.inf):
        bad[1] = value
        assert error(bad, TRUTH) == torch.inf
        assert error(TRUTH, bad) == torch.inf
        assert error(bad, bad) == 0


def test_another_shape_fails() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_as_exact_as(TRUTH.float()[:2], TRUTH.float(), TRUTH, "shorter")


def test_the_floor_follows_dtype_and_magnitude() -> None:
    assert floor(torch.bfloat16, TRUTH) > 1000 * floor(torch.float32, TRUTH)
    assert floor(torch.float32, 10 * TRUTH) == pytest.approx(10 * floor(torch.float32, TRUTH))
    assert floor(torch.float32, torch.zeros(0, dtype=torch.float64)) == 0
