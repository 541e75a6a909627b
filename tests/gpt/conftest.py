"""What the tests of the reference GPT share: a small text, a small model, and the text of the seeds if it is here."""

import pytest
import torch
from trilby.gpt import CharTokenizer, GPTConfig, Split, default_text, split


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are computed before a second thread has begun; on a busy machine they wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def generators():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def config() -> GPTConfig:
    return GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture
def wide(every_size) -> GPTConfig:
    """A model whose attention, in a batch of 8, is trilby's, and its norms too: however few their elements are."""
    return GPTConfig(block_size=64, vocab_size=29, n_layer=2, n_head=4, n_embd=64)


@pytest.fixture
def text() -> str:
    rows = [f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(99, 0, -1)]
    return "".join(rows)


@pytest.fixture
def tokenizer(text) -> CharTokenizer:
    return CharTokenizer.from_text(text)


@pytest.fixture
def tokens(text, tokenizer) -> Split:
    return split(tokenizer.encode(text))


@pytest.fixture(scope="session")
def tinyshakespeare() -> str:
    text = default_text()
    if len(text.content) != 1_115_394 or not text.content.startswith("First Citizen:\nBefore we proceed"):
        pytest.skip(f"needs tinyshakespeare, which TRILBY_TEXT can name; the default text here is {text.source}")
    return text.content


@pytest.fixture
def printed_batch() -> list[list[list[int]]]:
    """X and y, (4, 8) each: the first batch of tinyshakespeare that the course draws and prints."""
    x = [
        [24, 43, 58, 5, 57, 1, 46, 43],
        [44, 53, 56, 1, 58, 46, 39, 58],
        [52, 58, 1, 58, 46, 39, 58, 1],
        [25, 17, 27, 10, 0, 21, 1, 54],
    ]
    y = [
        [43, 58, 5, 57, 1, 46, 43, 39],
        [53, 56, 1, 58, 46, 39, 58, 1],
        [58, 1, 58, 46, 39, 58, 1, 46],
        [17, 27, 10, 0, 21, 1, 54, 39],
    ]
    return [x, y]
