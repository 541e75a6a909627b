"""Attention's dropout: which pairs are dropped, by kernels and reference alike."""

import math

import pytest
import torch
from attention_case import gradients
from attention_features import FEATURES
from torch import Tensor
from trilby.kernels import reference
from trilby.kernels.options import AttentionOptions

OPERATOR = torch.ops.trilby.attention
SEEDS = (0, 1, 2**32, 2**63 - 1, -1, -(2**63))


def unit_rows(B: int, H: int, T: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 0, which see all keys alike, and values that are the rows of the identity: output is probability."""
    query, key = torch.zeros(B, H, T, 1, dtype=dtype), torch.zeros(B, H, S, 1, dtype=dtype)
    value = torch.eye(S, dtype=dtype).expand(B, H, S, S)
    return query.requires_grad_(), key.requires_grad_(), value.clone().requires_grad_()


def factors(seed: int, planes: int, rows: range, columns: int, dropout_p: float) -> Tensor:
    """What the reference multiplies probabilities by, [planes, rows, columns]."""
    row = torch.arange(rows.start, rows.stop)
    return reference.attention_dropout_factors(torch.tensor([seed]), torch.arange(planes), row, columns, dropout_p)


@pytest.mark.parametrize("seed", SEEDS)
def test_drops_what_the_reference_drops(seed: int, level: str) -> None:
    B, H, T, S = 2, 3, 70, 150
    options = AttentionOptions(seed=torch.tensor([seed]), dropout_p=0.3)
    inputs = unit_rows(B, H, T, S)
    output = OPERATOR(*inputs, *options)[0]
    expected = factors(seed, B * H, range(T), S, 0.3).view(B, H, T, S)
    assert torch.equal(output != 0, expected != 0)
    torch.testing.assert_close(output * S, expected.float())
    grad_output = torch.eye(T, S).expand(B, H, T, S)  # what value gets back, [B, H, S, Dv]: the same pairs
    grad_value = gradients(output, inputs, grad_output)[2]
    assert torch.equal(grad_value[..., :T].mT != 0, expected != 0)


def test_a_window_drops_the_same_pairs(level: str) -> None:
    """Blocks that begin late, or are skipped, draw as if they did not."""
    T = S = 200
    options = AttentionOptions(seed=torch.tensor([9]), dropout_p=0.3, window_left=50, window_right=3)
    output = OPERATOR(*unit_rows(1, 1, T, S), *options)[0][0, 0]
    assert torch.equal(output != 0, (factors(9, 1, range(T), S, 0.3)[0] != 0) & _window(T, S, 50, 3))


def _window(T: int, S: int, left: int, right: int) -> Tensor:
    distance = torch.arange(S) - torch.arange(T)[:, None]
    return (distance >= -left) & (distance <= right)


def test_packed_sequences_count_rows_by_tensor_and_keys_by_sequence(level: str) -> None:
    starts = torch.tensor([2, 35, 35, 75], dtype=torch.int32)
    query, key, value = unit_rows(1, 2, 80, 80)
    options = AttentionOptions(seed=torch.tensor([5]), query_starts=starts, key_starts=starts, dropout_p=0.4)
    output = OPERATOR(query, key, value, *options)[0][0]
    for first, end in ((2, 35), (35, 75)):
        expected = factors(5, 2, range(first, end), end - first, 0.4)
        assert torch.equal(output[:, first:end, first:end] != 0, expected != 0)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_drops_as_many_as_it_is_told(dropout_p: float, level: str) -> None:
    """Within five standard deviations of a binomial distribution, and so does each row of heads."""
    B, H, T, S = 1, 8, 128, 256
    dropped = OPERATOR(*unit_rows(B, H, T, S), *AttentionOptions(seed=torch.tensor([7]), dropout_p=dropout_p))[0] == 0
    for counted in (dropped, *dropped.unbind(1)):
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / counted.numel())
        assert abs(counted.double().mean().item() - dropout_p) < 5 * deviation


def test_a_probability_that_rounds_to_zero_drops_nothing(level: str) -> None:
    inputs = unit_rows(1, 1, 40, 40)
    options = AttentionOptions(seed=torch.tensor([7]), dropout_p=2.0**-18)
    assert torch.equal(OPERATOR(*inputs, *options)[0], OPERATOR(*inputs, *AttentionOptions())[0])


def test_logsumexp_is_that_without_dropout(level: str) -> None:
    call = FEATURES["everything"]
    inputs, options = call.inputs(torch.float32), call.ask(call, torch.float32)
    without = options._replace(seed=None, dropout_p=0.0)
    assert torch.equal(OPERATOR(*inputs, *options)[1], OPERATOR(*inputs, *without)[1])
