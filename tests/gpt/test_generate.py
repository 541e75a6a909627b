"""Generation: the same tokens with a cache as without, from the same seed, whole characters only."""

import itertools

import pytest
import torch
from trilby.gpt import GPT, GREEDY, CharTokenizer, Sampling, generate, generate_texts, stream, stream_text
from trilby.gpt.generate import context_start, encode_prompt


def test_a_seed_decides_and_the_global_generator_is_left_alone(config):
    model, prompt = GPT(config).eval(), torch.zeros(2, 1, dtype=torch.int64)
    before = torch.get_rng_state()
    same = [generate(model, prompt, 30, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    other = generate(model, prompt, 30, generator=torch.Generator().manual_seed(6))
    assert torch.equal(*same)
    assert not torch.equal(same[0], other)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_takes_the_argmax_of_the_last_block_of_tokens(config):
    model = GPT(config).eval()
    tokens = torch.randint(config.vocab_size, (2, 5))
    generated = generate(model, tokens, 20, GREEDY)  # beyond block_size, 16
    for _ in range(20):
        following = model(tokens[:, -config.block_size :])[:, -1].argmax(dim=1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(generated, tokens)


WAYS = [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=10), Sampling(top_p=0.8)]


@pytest.mark.parametrize("slide", [1, 5, 16])
@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_a_cache_changes_no_token(config, sampling, slide):
    model, tokens = GPT(config).eval(), torch.randint(config.vocab_size, (2, 5))
    with_cache, without = (
        generate(model, tokens, 40, sampling, torch.Generator().manual_seed(7), slide=slide, use_cache=use_cache)
        for use_cache in (True, False)  # 45 tokens, of which block_size is 16
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("slide", [1, 8])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_goes_on_alike_alone_and_among_others(config, slide, use_cache):
    model = GPT(config).eval()
    texts = [torch.randint(config.vocab_size, (length,)) for length in (1, 15, 6, 30)]
    together = generate_texts(model, texts, 30, GREEDY, slide=slide, use_cache=use_cache)
    for text, continued in zip(texts, together):
        assert torch.equal(continued, generate(model, text[None], 30, GREEDY, slide=slide)[0])


def test_each_token_is_read_once(config):
    """What a cache is for: after the prompt, the model is given one token at a time."""
    model, read = GPT(config).eval(), []
    model.transformer.wte.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, torch.zeros(1, 4, dtype=torch.int64), 12, GREEDY)
    assert read == [4] + [1] * 11


@pytest.mark.parametrize(
    ("length", "slide", "start"), [(8, 1, 0), (9, 1, 1), (20, 1, 12), (8, 3, 0), (9, 3, 3), (11, 3, 3), (12, 3, 6)]
)
def test_where_a_context_begins_follows_from_the_length_alone(length, slide, start):
    assert context_start(length, 8, slide) == start
    assert context_start(length, None, slide) == 0


@pytest.mark.parametrize("length", range(1, 60))
@pytest.mark.parametrize("slide", [1, 7, 8])
def test_a_context_is_never_empty_nor_too_long(length, slide):
    assert 1 <= length - context_start(length, 8, slide) <= 8


def test_a_stream_gives_every_token_as_soon_as_it_is_there(config):
    model, prompt = GPT(config).eval(), torch.zeros(1, 1, dtype=torch.int64)
    first = list(itertools.islice(stream(model, prompt, 10**9, GREEDY), 3))
    assert torch.equal(torch.cat([prompt, *first], dim=1), generate(model, prompt, 3, GREEDY))


class Bytes:
    """A tokenizer whose ids are bytes, so that a character can take several."""

    def decode_bytes(self, ids):
        return bytes(ids)


class Recitation:
    """A model that always says the same."""

    block_size = None

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, tokens):
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[0, -1, self.ids[tokens.shape[1] - 1]] = 1.0
        return logits


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ("aé⚅", ["a", "", "é", "", "", "⚅", ""]),
        (b"a\xe2\x9a", ["a", "", "", "�"]),
        (b"\xffa", ["�", "a", ""]),
    ],
)
def test_streamed_text_has_whole_characters(said, pieces):
    said = said.encode() if isinstance(said, str) else said
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert list(stream_text(Recitation(said), Bytes(), prompt, len(said), GREEDY)) == pieces


def test_a_prompt_is_a_document_of_its_own():
    assert encode_prompt(CharTokenizer("ab"), "ba").tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(CharTokenizer("ab"), "")


@pytest.mark.parametrize("shape", [(3,), (1, 0)])
def test_tokens_to_start_from_are_needed(config, shape):
    with pytest.raises(ValueError, match="tokens is"):
        generate(GPT(config), torch.zeros(shape, dtype=torch.int64), 1)


def test_texts_to_start_from_are_needed(config):
    for texts in ([], [torch.zeros(2, 2, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]):
        with pytest.raises(ValueError, match="tokens is"):
            generate_texts(GPT(config), texts, 1)


@pytest.mark.parametrize("slide", [0, 17])
def test_a_context_slides_by_some_of_its_tokens(config, slide):
    with pytest.raises(ValueError, match=f"slide is {slide}; it must be at least 1 and at most block_size, 16"):
        generate(GPT(config), torch.zeros(1, 1, dtype=torch.int64), 1, slide=slide)
