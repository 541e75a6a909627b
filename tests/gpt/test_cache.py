"""The cache: reading on gives what reading all at once gives, for texts of any lengths, in pieces of any length."""

import pytest
import torch
from tolerance import assert_as_exact_as
from trilby.gpt import GPT
from trilby.gpt.cache import Cache, LayerCache


@pytest.fixture
def model(config) -> GPT:
    return GPT(config).eval().requires_grad_(False)


@pytest.fixture
def tokens(config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, config.block_size))


def in_pieces(model, tokens, lengths, cache=None):
    cache = cache or model.make_cache(len(tokens))
    return torch.cat([model(piece, cache) for piece in tokens.split(lengths, dim=1)], dim=1)


def assert_same_logits(model, found, tokens, what):
    assert_as_exact_as(found, model(tokens), model.double()(tokens), what)


@pytest.mark.parametrize("lengths", [[16], [1] * 16, [7, 9], [15, 1], [1, 2, 3, 4, 6], [8, 1, 1, 6]], ids=str)
def test_every_chunking_of_a_prompt_equals_the_whole(model, tokens, lengths):
    assert_same_logits(model, in_pieces(model, tokens, lengths), tokens, "logits")


@pytest.mark.parametrize("counts", [[1, 9, 12], [12, 12, 12], [5, 5, 1]], ids=str)
def test_texts_of_different_lengths_are_read_together(model, tokens, counts):
    counts = torch.tensor(counts)
    cache = model.make_cache(3)
    first = model.next_logits(tokens[:, :12], cache, counts)
    further = torch.cat([model(tokens[:, 12:14], cache), model(tokens[:, 14:16], cache)], dim=1)
    assert cache.lengths.tolist() == (counts + 4).tolist()
    exact = GPT(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for row, count in enumerate(counts.tolist()):
        text = torch.cat([tokens[row, :count], tokens[row, 12:]])[None]
        found = torch.cat([first[row : row + 1], further[row]])[None]
        assert_as_exact_as(found, model(text)[:, count - 1 :], exact(text)[:, count - 1 :], f"logits of text {row}")


def test_padding_is_read_by_no_one(model, tokens):
    """Whatever stands behind a text that has ended, its logits are the same, bit for bit."""
    counts, logits = torch.tensor([3, 12, 7]), []
    for padding in (0, 28):
        cache, padded = model.make_cache(3), tokens[:, :12].clone()
        padded[torch.arange(12) >= counts[:, None]] = padding
        logits.append(torch.stack([model.next_logits(padded, cache, counts), model.next_logits(tokens[:, :1], cache)]))
    assert torch.equal(*logits)


def test_what_is_cleared_is_forgotten(model, tokens):
    cache = model.make_cache(3)
    model.next_logits(tokens, cache, torch.tensor([4, 16, 9]))
    cache.clear()
    assert torch.equal(in_pieces(model, tokens, [8, 8], cache), in_pieces(model, tokens, [8, 8]))


def test_a_pass_that_fails_leaves_the_cache_as_it_was(model, tokens):
    cache = model.make_cache(3)
    before = model(tokens[:, :8], cache)
    with pytest.raises(IndexError):
        model(torch.full((3, 8), 29), cache)
    after = model(tokens[:, 8:], cache)
    assert torch.equal(torch.cat([before, after], dim=1), in_pieces(model, tokens, [8, 8]))


def test_the_decoder_runs_on_last_tokens_only(model, tokens):
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    model.next_logits(tokens)
    model.next_logits(tokens, None, torch.tensor([1, 2, 3]))
    assert rows == [3, 3]


def test_memory_is_that_of_the_tokens_asked_for(config, model):
    layer = model.make_cache(2, 5).begin(torch.zeros(2, 1, dtype=torch.int64)).layers[0]
    assert layer.memory.shape == (2, 2, config.n_head, 5, config.n_embd // config.n_head)


def test_what_does_not_fit_is_refused(config, model, tokens):
    with pytest.raises(ValueError, match=r"tokens is \(3, 16\); the cache has 0 and no room beyond 4"):
        model(tokens, model.make_cache(3, 4))
    with pytest.raises(ValueError, match=r"tokens is \(3, 16\); this cache is for 2 sequences"):
        model(tokens, model.make_cache(2))
    for size in (0, 17):
        with pytest.raises(ValueError, match=f"size is {size}; it must be at least 1 and at most block_size, 16"):
            Cache(config, 1, size)


def test_a_wrong_place_would_be_noticed(model, tokens, monkeypatch):
    """A mutant: keys written one place too early."""
    extend = LayerCache.extend

    def misplace(self, new):
        start = max(self.places.start - 1, 0)
        return extend(self._replace(places=self.places._replace(start=start, stop=start + new.shape[3])), new)

    monkeypatch.setattr(LayerCache, "extend", misplace)
    with pytest.raises(AssertionError):
        assert_same_logits(model, in_pieces(model, tokens, [8, 8]), tokens, "logits")
