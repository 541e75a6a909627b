"""Weights held for generating: as exact as PyTorch's where the format is the same, and 8 bits as good as 8 bits are."""

import pytest
import torch
from tolerance import assert_as_exact_as
from trilby.gpt import GPT, GREEDY, PYTORCH, GPTConfig, generate
from trilby.gpt.weights import QuantizedLinear, dense, hold


@pytest.fixture
def config() -> GPTConfig:
    """Wide enough for the kernels of few rows."""
    return GPTConfig(block_size=16, vocab_size=1031, n_layer=2, n_head=4, n_embd=256)


@pytest.fixture
def model(config) -> GPT:
    return GPT(config).eval().requires_grad_(False)


def step_by_step(model, tokens):
    cache = model.make_cache(len(tokens))
    return torch.stack([model.next_logits(part, cache) for part in tokens.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_logits_are_as_exact_as_pytorchs(model, weights, batch_size):
    """PyTorch's of the same weights: rounded to 8 bits, they are the numbers that the integers stand for."""
    tokens = torch.randint(1031, (batch_size, 10))
    held = hold(model, weights)
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    rival, truth = (dense(held, PYTORCH, kind) for kind in (dtype, torch.float64))
    assert_as_exact_as(step_by_step(held, tokens), step_by_step(rival, tokens), truth(tokens), f"{weights} logits")


def test_rounding_to_8_bits_moves_logits_a_little(model):
    tokens = torch.randint(1031, (2, 16))
    before = model(tokens)
    after = hold(model, "int8")(tokens)
    assert 0 < (after - before).std() / before.std() < 0.03


def test_8_bits_are_a_quarter_of_the_memory(model):
    held = [module for module in hold(model, "int8").modules() if isinstance(module, QuantizedLinear)]
    assert sum(each.weight.values.nbytes for each in held) == 2 * 12 * 256 * 256 + 1031 * 256


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_texts_are_generated_with_the_cache_as_without(model, weights):
    held, tokens = hold(model, weights), torch.randint(1031, (2, 4))
    texts = [generate(held, tokens, 8, GREEDY, use_cache=use_cache) for use_cache in (True, False)]
    assert texts[0].shape == (2, 12)
    if weights == "int8":  # in bfloat16, two logits in a thousand may be rounded to the same
        assert torch.equal(*texts)


def test_the_embedding_stays_what_it_was(model):
    before = model.transformer.wte.weight.clone()
    assert torch.equal(hold(model, "int8").transformer.wte.weight, before)


def test_an_unknown_format_is_refused_by_name(model):
    with pytest.raises(ValueError, match="weights is 'int4'; allowed are float32, bfloat16, int8"):
        hold(model, "int4")
