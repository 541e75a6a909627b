"""Generation: which tokens may follow and how likely, the same from the same seed, whole characters only."""

import itertools

import pytest
import torch
from trilby.gpt import GPT, GREEDY, Bigram, CharTokenizer, Sampling, generate, stream, stream_text
from trilby.gpt.generate import encode_prompt
from trilby.gpt.sampling import next_token_probabilities

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


def test_draws_follow_the_distribution():
    model = Bigram(4)
    model.token_embedding_table.weight.data[:] = LOGITS
    tokens = generate(model, torch.zeros(20_000, 1, dtype=torch.int64), 1, generator=torch.Generator().manual_seed(0))
    share = tokens[:, 1].bincount(minlength=4) / len(tokens)
    expected = LOGITS[0].softmax(0)
    deviation = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((share - expected).abs() < 4 * deviation).all()  # four standard deviations of a share


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
