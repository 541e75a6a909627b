"""The walk through a model: what is shown is what the model computed."""

import math

import pytest
import torch
from trilby.gpt import GPT, CharTokenizer, TiktokenTokenizer
from trilby.gpt.explain import MOST_COLUMNS, describe, walk


@pytest.fixture
def model(config) -> GPT:
    model = GPT(config).eval()
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_attn.weight)  # so that heads look somewhere
    return model


@pytest.fixture
def tokens(config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (9,))


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 3), (1, 2)])
def test_the_attention_is_that_of_the_model(model, tokens, layer, head):
    """With the table shown, the head gives what the kernel gave."""
    given = {}
    attention = model.transformer.h[layer].attn
    attention.c_attn.register_forward_hook(lambda _, inputs, output: given.update(heads=output.view(8, 3, 4, 8)))
    attention.c_proj.register_forward_pre_hook(lambda _, inputs: given.update(found=inputs[0].view(8, 4, 8)))
    seen = walk(model, tokens, layer, head).attention
    torch.testing.assert_close(seen @ given["heads"][:, 2, head], given["found"][:, head])
    assert torch.equal(seen, seen.tril())
    torch.testing.assert_close(seen.sum(dim=1), torch.ones(8))


def test_the_losses_are_those_of_training(model, tokens):
    torch.testing.assert_close(walk(model, tokens).losses.mean(), model.loss(tokens[None, :-1], tokens[None, 1:]))


def test_the_shapes_are_those_that_went_through(model, tokens):
    shapes = dict(walk(model, tokens).shapes)
    assert shapes["transformer.wte"] == (1, 8, 32)
    assert shapes["transformer.wpe"] == (8, 32)
    assert shapes["transformer.h.1.attn.c_attn"] == (1, 8, 96)
    assert shapes["transformer.h.0.mlp.c_fc"] == (1, 8, 128)
    assert shapes["lm_head"] == (1, 8, 29)


def test_the_text_says_all_of_it(model):
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz \n.")
    tokens = torch.tensor(tokenizer.encode("to be or\nnot."))
    text = "\n".join(describe(model, tokenizer, tokens))
    assert "1. Text to tokens: 13 of 29 kinds" in text
    assert "          0  t                 19  o                 14" in text
    assert "          8  \\n                27  n                 13" in text
    assert "B = 1 text, T = 12 tokens, C = 32 numbers for each, H = 4 heads of D = 8" in text
    assert "the same in every block, of 2" in text
    assert f"ln(29) = {math.log(29):.4f}" in text
    assert f"The loss is their mean, {walk(model, tokens).losses.mean():.4f}" in text
    assert not [line for line in text.splitlines() if len(line) > 120]


def test_a_long_text_is_cut_to_fit(model):
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz \n.")
    text = "\n".join(describe(model, tokenizer, torch.zeros(17, dtype=torch.int64)))
    assert f"… and {16 - MOST_COLUMNS} more" in text


def test_the_pieces_that_gpt2_reads(config):
    """The text and the ids that the fifth seed prints, and parts of characters."""
    tokenizer = TiktokenTokenizer("gpt2")
    model = GPT(type(config)(block_size=64, n_layer=1, n_head=1, n_embd=8)).eval()
    tokens = torch.tensor([tokenizer.start, *tokenizer.encode("I am an autoregressive, ⋯")])
    lines = list(describe(model, tokenizer, tokens))
    assert "          4  ·aut            1960  ore              382" in "\n".join(lines)
    assert "          0  <|start|>      50256  I                 40" in "\n".join(lines)
    assert "\\xe2" in "\n".join(lines)


def test_what_cannot_be_shown_is_refused_by_name(model, tokens):
    for count in (1, 18):
        with pytest.raises(ValueError, match=f"text has {count} tokens; it must have at least 2 and at most 17"):
            walk(model, torch.zeros(count, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer is 2; the model has 0 to 1"):
        walk(model, tokens, layer=2)
    with pytest.raises(ValueError, match="head is 4; the model has 0 to 3"):
        walk(model, tokens, head=4)
