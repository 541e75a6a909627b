"""Documents: packed or padded, each is read as if it were alone; and what is loaded ahead changes nothing."""

import dataclasses
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as
from trilby.gpt import GPT, PYTORCH, TRILBY, TrainConfig, Training, split
from trilby.gpt.data import IGNORED, Documents, PackedBatches, PaddedBatches, Prefetched, RandomBatches, make_batches

START = 0  # the id that marks the beginning of a document


def text_of(lengths, marked=True):
    """Documents of these lengths, of ids from 1 on, each after START if they are marked."""
    ids, starts = [], []
    for length in lengths:
        starts.append(len(ids))
        ids += [START, *range(1, length)] if marked else range(1, length + 1)
    return torch.tensor(ids), Documents(torch.tensor(starts), marked)


class TestPacked:
    def test_a_row_is_cut_at_documents_and_at_the_context(self):
        tokens, documents = text_of([2, 9, 4], marked=False)
        x, y, starts = PackedBatches(tokens, documents, batch_size=2, block_size=4).next()
        assert x.tolist() == [[1, 2, 1, 2, 3, 4, 5, 6]]
        assert y.tolist() == [[2, IGNORED, 2, 3, 4, 5, 6, 7]]
        assert (starts.tolist(), starts.dtype) == ([0, 2, 6, 8], torch.int32)

    def test_a_marked_document_ends_with_the_next_ones_mark(self):
        x, y, starts = PackedBatches(*text_of([2, 4, 4]), batch_size=2, block_size=3).next()
        assert (x.tolist(), y.tolist()) == ([[0, 1, 0, 1, 2, 3]], [[1, 0, 1, 2, 3, 0]])
        assert starts.tolist() == [0, 2, 5, 6]

    @settings(max_examples=50, deadline=None)
    @given(lengths=st.lists(st.integers(1, 12), min_size=3), T=st.integers(1, 5), B=st.integers(1, 3))
    def test_every_sequence_is_a_part_of_one_document(self, lengths, T, B):
        tokens, documents = text_of([*lengths, 16])
        batches = PackedBatches(tokens, documents, B, T)
        for _ in range(4):
            first = batches.position if batches.position + B * T < len(tokens) else 0
            x, y, starts = batches.next()
            sequences = starts.diff()
            assert starts[0] == 0
            assert starts[-1] == B * T
            assert 1 <= sequences.min() <= sequences.max() <= T
            begun = {place - first for place in documents.starts.tolist() if first <= place < first + B * T}
            assert begun <= set(starts.tolist())
            assert torch.equal(x[0], tokens[first : first + B * T])
            assert torch.equal(y[0], tokens[first + 1 : first + B * T + 1])


class TestPadded:
    def test_a_document_is_a_row_and_a_long_one_goes_on_in_the_next(self):
        tokens, documents = text_of([3, 6], marked=False)
        x, y, starts = PaddedBatches(tokens, documents, batch_size=3, block_size=4).next()
        assert x.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [5, 0, 0, 0]]
        assert y.tolist() == [[2, 3, IGNORED, IGNORED], [2, 3, 4, 5], [6, IGNORED, IGNORED, IGNORED]]
        assert starts is None

    def test_a_marked_document_ends_with_the_next_ones_mark(self):
        x, y, _ = PaddedBatches(*text_of([2, 3]), batch_size=2, block_size=3).next()
        assert x.tolist() == [[0, 1, 0], [0, 1, 0]]
        assert y.tolist() == [[1, START, IGNORED], [1, 2, IGNORED]]

    @settings(max_examples=50, deadline=None)
    @given(lengths=st.lists(st.integers(1, 12), min_size=1), T=st.integers(1, 5), marked=st.booleans())
    def test_every_target_comes_up_once_in_each_round(self, lengths, T, marked):
        tokens, documents = text_of([*lengths, 2], marked)
        batches = PaddedBatches(tokens, documents, 1, T)
        targets = torch.cat([batches.next().y.flatten() for _ in range(len(batches.rows))])
        expected = tokens[1:] if marked else [token for token in tokens.tolist() if token > 1]
        assert targets[targets != IGNORED].tolist() == list(expected)

    def test_documents_of_one_id_have_nothing_to_predict(self):
        with pytest.raises(ValueError, match="a document of at least 2 ids"):
            PaddedBatches(*text_of([1], marked=False), batch_size=1, block_size=4)


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_a_packed_document_is_read_as_if_it_were_alone(config, layers):
    model = GPT(config, layers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    lengths = [3, 1, 16, 7]
    parts = [torch.randint(config.vocab_size, (1, length)) for length in lengths]
    row, targets = torch.cat(parts, dim=1), torch.randint(config.vocab_size, (1, sum(lengths)))
    targets[0, 2] = IGNORED
    starts = torch.tensor([0, 3, 4, 20, 27], dtype=torch.int32)
    ours = model.loss(row, targets, starts)
    ours.backward()
    gradient = model.transformer.wte.weight.grad.clone()

    def alone(gpt):
        logits = torch.cat([gpt(part) for part in parts], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model.zero_grad()
    rival = alone(model)
    rival.backward()
    exact = GPT(config, PYTORCH).double()
    exact.load_state_dict(model.state_dict())
    truth = alone(exact)
    truth.backward()
    assert_as_exact_as(ours.detach(), rival.detach(), truth.detach(), "loss")
    weights = (gpt.transformer.wte.weight for gpt in (model, exact))
    assert_as_exact_as(gradient, *(weight.grad for weight in weights), "gradient")


@pytest.mark.parametrize("layers", [TRILBY, PYTORCH], ids=["trilby", "pytorch"])
def test_nothing_is_seen_over_a_border(config, layers):
    model = GPT(config, layers)
    tokens = torch.randint(config.vocab_size, (1, 10))
    targets = torch.full((1, 10), IGNORED)
    targets[0, 6:] = 1
    starts = torch.tensor([0, 6, 10], dtype=torch.int32)
    changed = tokens.clone()
    changed[0, :6] += 1
    changed %= config.vocab_size
    assert torch.equal(model.loss(changed, targets, starts), model.loss(tokens, targets, starts))
    joined = torch.tensor([0, 10], dtype=torch.int32)
    assert not torch.equal(model.loss(changed, targets, joined), model.loss(tokens, targets, joined))


def test_a_packed_batch_is_one_row(config):
    with pytest.raises(ValueError, match=r"tokens is \(2, 4\); with starts it must be one row"):
        GPT(config).loss(*torch.zeros(2, 2, 4, dtype=torch.int64), torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.parametrize("sampler", ["packed", "padded"])
def test_it_learns_from_documents(config, sampler):
    tokens, documents = text_of([9, 5, 12] * 30)
    settings = TrainConfig(
        batch_size=4, max_steps=60, learning_rate=1e-2, warmup_steps=5, eval_interval=0, sampler=sampler
    )
    model = dataclasses.replace(config, dropout=0.1)
    losses = Training.start(model, settings, split(tokens, documents)).run().losses
    # All but the lengths of the documents can be known: 3 of them in 26 tokens, a third of a nat each at the most.
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]


@pytest.mark.parametrize("sampler", ["random", "contiguous", "packed", "padded"])
class TestPrefetched:
    def supplies(self, sampler):
        tokens, documents = text_of([9, 5, 12] * 5)
        plain = make_batches(sampler, split(tokens, documents), 2, 4, seed=1)
        return plain, Prefetched(make_batches(sampler, split(tokens, documents), 2, 4, seed=1))

    def test_batches_and_states_are_those_of_the_supply_itself(self, sampler):
        plain, ahead = self.supplies(sampler)
        for _ in range(12):
            ours, theirs = ahead.next(), plain.next()
            assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2]))
            assert torch.equal(ahead.state(), plain.state())

    def test_it_goes_on_from_a_state(self, sampler):
        plain, ahead = self.supplies(sampler)
        ahead.next()
        state = ahead.state().clone()
        expected = [ahead.next().x.tolist() for _ in range(3)]
        ahead.restore(state)
        assert torch.equal(ahead.state(), state)
        assert [ahead.next().x.tolist() for _ in range(3)] == expected
        plain.restore(state)
        assert [plain.next().x.tolist() for _ in range(3)] == expected


class Slow:
    """A supply that waits for a sign before each batch but the first."""

    def __init__(self):
        self.go, self.loaded = threading.Semaphore(1), 0

    def next(self):
        self.go.acquire()
        self.loaded += 1
        return self.loaded

    def state(self):
        return torch.tensor([self.loaded])


def test_the_next_batch_loads_while_the_step_computes():
    slow = Slow()
    ahead = Prefetched(slow)
    assert ahead.next() == 1
    slow.go.release()  # nobody asks for a second batch, and yet:
    deadline = time.monotonic() + 60
    while slow.loaded < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert slow.loaded == 2
    assert ahead.state().item() == 1
    slow.go.release()
    ahead.close()


def test_an_error_in_loading_is_raised_where_the_batch_is_asked_for():
    class Broken(RandomBatches):
        def next(self):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Prefetched(Broken(torch.arange(10), 1, 2, torch.Generator())).next()
