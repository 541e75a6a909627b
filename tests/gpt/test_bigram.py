"""The stepping stones, with the numbers that the course they are from prints."""

import pytest
import torch
from trilby.gpt import Bigram, CharTokenizer, generate, split
from trilby.gpt.bigram import (
    average_by_loop,
    average_by_matrix,
    average_by_softmax,
    softmax_weights,
    triangular_weights,
)
from trilby.gpt.data import RandomBatches


def test_the_new_bigram_loses_what_the_course_prints(printed_batch):
    torch.manual_seed(1337)
    model = Bigram(vocab_size=65)
    x, y = torch.tensor(printed_batch)
    assert model(x).shape == (4, 8, 65)
    assert round(model.loss(x, y).item(), 4) == 4.8786


def test_the_bigram_writes_what_the_courses_own_loop_writes():
    """The course prints its sample, too; but what PyTorch draws from a seed has changed since, so its loop is run."""
    model = Bigram(vocab_size=65)
    torch.manual_seed(1337)
    expected = torch.full((2, 4), 24)
    for _ in range(10):
        probabilities = torch.softmax(model.token_embedding_table(expected)[:, -1, :], dim=-1)
        expected = torch.cat([expected, torch.multinomial(probabilities, num_samples=1)], dim=1)
    torch.manual_seed(1337)
    assert torch.equal(generate(model, torch.full((2, 4), 24), max_new_tokens=10), expected)


@pytest.mark.slow
def test_the_bigram_of_15000_steps_ends_near_where_the_course_ends(tinyshakespeare):
    tokenizer = CharTokenizer.from_text(tinyshakespeare)
    torch.manual_seed(1337)
    model = Bigram(tokenizer.vocab_size)
    batches = RandomBatches(split(tokenizer.encode(tinyshakespeare)).train, 32, 8, torch.default_generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15_000):
        loss = model.loss(*batches.next()[:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The course prints 2.4712 for its last batch; the mean of the last hundred varies less than a batch does.
    assert sum(losses[-100:]) / 100 == pytest.approx(2.47, abs=0.03)


AVERAGED = [
    [0.1808, -0.0700],
    [-0.0894, -0.4926],
    [0.1490, -0.3199],
    [0.3504, -0.2238],
    [0.3525, 0.0545],
    [0.0688, -0.0396],
    [0.0927, -0.0682],
    [-0.0341, 0.1332],
]


@pytest.mark.parametrize("average", [average_by_loop, average_by_matrix, average_by_softmax])
def test_averages_are_those_that_the_course_prints(average):
    torch.manual_seed(1337)
    averaged = average(torch.randn(4, 8, 2))
    assert averaged.shape == (4, 8, 2)
    torch.testing.assert_close(averaged[0], torch.tensor(AVERAGED), rtol=0, atol=0.5e-4 + 1e-6)  # four printed digits


def test_the_example_with_three_positions():
    torch.manual_seed(42)
    numbers = torch.randint(0, 10, (3, 2)).float()
    assert numbers.tolist() == [[2, 7], [6, 4], [6, 5]]
    averaged = average_by_matrix(numbers[None])[0]
    expected = torch.tensor([[2.0, 7.0], [4.0, 5.5], [4.6667, 5.3333]])
    torch.testing.assert_close(averaged, expected, rtol=0, atol=0.5e-4 + 1e-6)


@pytest.mark.parametrize("weights", [triangular_weights, softmax_weights])
def test_weights_are_the_table_of_five_positions(weights):
    table = [
        [1.0000, 0.0000, 0.0000, 0.0000, 0.0000],
        [0.5000, 0.5000, 0.0000, 0.0000, 0.0000],
        [0.3333, 0.3333, 0.3333, 0.0000, 0.0000],
        [0.2500, 0.2500, 0.2500, 0.2500, 0.0000],
        [0.2000, 0.2000, 0.2000, 0.2000, 0.2000],
    ]
    torch.testing.assert_close(weights(5), torch.tensor(table), rtol=0, atol=0.5e-4 + 1e-6)


@pytest.mark.parametrize("average", [average_by_loop, average_by_matrix, average_by_softmax])
def test_averages_do_not_see_the_future(average):
    numbers = torch.randn(2, 6, 3)
    changed = numbers.clone()
    changed[:, 4:] = 9.0
    assert torch.equal(average(changed)[:, :4], average(numbers)[:, :4])
