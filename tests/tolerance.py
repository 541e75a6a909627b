"""The one rule by which every kernel is judged; no test has a tolerance of its own.

A kernel is exact enough if its error against the truth is at most twice that of the kernel that a user would otherwise
run. The truth is the reference in float64 on the same, already rounded, inputs. A floor covers the cases in which the
rival happens to be exact: one rounding of the result to its own dtype, and four of float32 on the way there.
"""

import torch
from torch import Tensor

ROUNDINGS_ON_THE_WAY = 4


def error(result: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where one is a NaN or an infinity and the other is not the same."""
    result = result.double()
    same = (result == truth) | (result.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, (result - truth).abs())
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if difference.numel() else 0.0


def floor(dtype: torch.dtype, truth: Tensor) -> float:
    """What correct rounding alone may cost a result of `dtype` as large as `truth`."""
    finite = truth[truth.isfinite()].abs()
    magnitude = finite.max().item() if finite.numel() else 0.0
    return magnitude * (torch.finfo(dtype).eps / 2 + ROUNDINGS_ON_THE_WAY * torch.finfo(torch.float32).eps)


def assert_as_exact_as(ours: Tensor, rival: Tensor, truth: Tensor, what: str) -> None:
    """Fail unless |ours - truth| <= 2 · |rival - truth| + floor, everywhere."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    ours_error, rival_error = error(ours, truth), error(rival, truth)
    allowed = 2 * rival_error + floor(ours.dtype, truth)
    assert ours_error <= allowed, f"{what}: error {ours_error:.3e}, rival's {rival_error:.3e}, allowed {allowed:.3e}"
