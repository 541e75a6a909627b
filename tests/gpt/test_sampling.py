"""Sampling: which tokens may follow and how likely, and that draws are as likely as they should be."""

import pytest
import torch
from trilby.gpt import GREEDY, Sampling
from trilby.gpt.sampling import MOST_FOR_MULTINOMIAL, NUCLEUS_CANDIDATES, draw, next_token_probabilities

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
ALL = [0, 1, 2, 3]


def probabilities(**sampling):
    return next_token_probabilities(LOGITS, Sampling(**sampling))[0]


def test_by_default_it_draws_from_the_models_own_distribution():
    assert torch.equal(probabilities(), LOGITS[0].softmax(0))


def test_greedy_is_certain_of_the_likeliest():
    assert probabilities(temperature=0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert torch.equal(probabilities(temperature=temperature), (LOGITS[0] / temperature).softmax(0))


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    expected = torch.zeros(4)
    expected[kept] = LOGITS[0, kept].softmax(0)
    torch.testing.assert_close(probabilities(top_k=top_k), expected)


# softmax of the logits: 0.644 for token 1, 0.237 for 3, 0.087 for 2, 0.032 for 0
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.6, [1]), (0.7, [1, 3]), (0.9, [1, 2, 3]), (0.99, [0, 1, 2, 3]), (1, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_make_up_p(top_p, kept):
    expected = torch.zeros(4)
    expected[kept] = LOGITS[0, kept].softmax(0)
    torch.testing.assert_close(probabilities(top_p=top_p), expected)


def test_rows_are_independent():
    logits = torch.randn(5, 30)
    sampling = Sampling(temperature=0.7, top_k=10, top_p=0.8)
    rows = torch.cat([next_token_probabilities(row[None], sampling) for row in logits])
    torch.testing.assert_close(next_token_probabilities(logits, sampling), rows)


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_what_cannot_be_drawn_is_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


WAYS = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.5}, {"temperature": 0}]


@pytest.mark.parametrize("vocab_size", [20, 3 * MOST_FOR_MULTINOMIAL])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_draws_follow_the_distribution(way, vocab_size):
    logits = torch.randn(1, vocab_size)
    logits[:, :20] += 10  # so that every token worth counting is drawn often
    sampling, rows = Sampling(**way), 4_000
    drawn = torch.cat([draw(logits.expand(500, -1), sampling, torch.Generator().manual_seed(i)) for i in range(8)])
    share = drawn[:, 0].bincount(minlength=vocab_size) / rows
    expected = next_token_probabilities(logits, sampling)[0]
    deviation = (expected * (1 - expected) / rows).sqrt()
    assert (((share - expected).abs() < 5 * deviation + 1e-6) | (expected < 1e-3)).all()
    assert (share[expected == 0] == 0).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_the_nucleus_is_the_same_however_it_is_found(spread, top_p, monkeypatch):
    """Among the few largest, if they are enough, else among all: a flat distribution has a nucleus of thousands."""
    logits = torch.randn(3, 4 * NUCLEUS_CANDIDATES) * spread
    found = next_token_probabilities(logits, Sampling(top_p=top_p))
    monkeypatch.setattr("trilby.gpt.sampling.NUCLEUS_CANDIDATES", logits.shape[1])
    torch.testing.assert_close(found, next_token_probabilities(logits, Sampling(top_p=top_p)))
    assert ((found > 0).sum(dim=1) > NUCLEUS_CANDIDATES).all() == (spread == 0 or (spread, top_p) == (1, 0.9))


def test_draws_come_from_the_generator_alone():
    logits, before = torch.randn(2, 2 * MOST_FOR_MULTINOMIAL), torch.get_rng_state()
    for sampling in (Sampling(), Sampling(top_k=5), GREEDY):
        first, second = (draw(logits, sampling, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
