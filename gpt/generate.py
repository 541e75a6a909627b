"""Text from a model: one token at a time, each drawn from what the model expects after all before it.

A model reads no more than `block_size` tokens at once. What it reads of a longer text is decided by the length of that
text alone, never by how it is computed, so a cache changes no token; `slide` = 3, `block_size` = 8::

    text of  8   a b c d e f g h
    text of  9         d e f g h i          the context begins 3 tokens later,
    text of 10         d e f g h i j
    text of 11         d e f g h i j k
    text of 12               g h i j k l    and again

`slide` = 1 always reads the last `block_size` tokens, as nanoGPT does. But positions are learned as counted from the
start of the context, so when it moves, every key and value in it is another, and the whole context must be read anew. A
larger `slide` reads a little less, and seldom anew: with half of `block_size`, a token costs about two on average, and
not hundreds.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import Cache
from .sampling import PLAIN, Sampling, draw
from .tokenizers import Tokenizer


class LanguageModel(Protocol):
    """What can be generated from: a `GPT`, a `Bigram`, or anything else that has logits for the next token."""

    @property
    def block_size(self) -> int | None:
        """The longest context that it reads, None if there is no limit."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T)."""


@runtime_checkable
class CachingModel(Protocol):
    """A model that need not read what it has read before: a `GPT`."""

    @property
    def block_size(self) -> int:
        """The longest context that it reads."""

    def next_logits(self, tokens: Tensor, cache: Cache, counts: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the token after the first `counts`, (B), of `tokens` (B, T), which follow those cached."""

    def make_cache(self, batch_size: int, size: int) -> Cache:
        """An empty cache."""


class Texts:
    """B texts that grow by a token each at a time, and the context that a model reads of each."""

    def __init__(self, texts: Sequence[Tensor], block_size: int | None, slide: int) -> None:
        self.tokens = pad_sequence(list(texts), batch_first=True)  # (B, at least the longest)
        self.lengths = [len(text) for text in texts]
        self.are_equally_long = min(self.lengths) == max(self.lengths)
        self.newest: Tensor | None = None  # (B, 1), of each
        self.block_size = block_size
        self.slide = slide

    def append(self, token: Tensor) -> None:
        """One more token, (B, 1), for each text."""
        if max(self.lengths) == self.tokens.shape[1]:
            self.tokens = torch.cat([self.tokens, torch.zeros_like(self.tokens)], dim=1)
        if self.are_equally_long:
            self.tokens[:, self.lengths[0]] = token[:, 0]
        else:
            self.tokens[torch.arange(len(token)), self.lengths] = token[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        self.newest = token

    @property
    def starts(self) -> list[int]:
        """Where the context of each begins."""
        return [context_start(length, self.block_size, self.slide) for length in self.lengths]

    def contexts(self) -> tuple[Tensor, Tensor | None]:
        """The contexts, (B, T), and how long each is, (B), the rest of a row being padding; None: all are T long."""
        starts = self.starts
        if self.are_equally_long:
            return self.tokens[:, starts[0] : self.lengths[0]], None
        rows = [row[start:length] for row, start, length in zip(self.tokens, starts, self.lengths)]
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=rows[0].device)


def context_start(length: int, block_size: int | None, slide: int) -> int:
    """The first token that is read of a text of `length` tokens: the drawing above."""
    excess = 0 if block_size is None else max(0, length - block_size)
    return -(-excess // slide) * slide


def stream(
    model: LanguageModel,
    tokens: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    slide: int = 1,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield each new token, (B, 1), as soon as it is there.

    Args:
        model: In evaluation mode, if it has dropout.
        tokens: (B, T) int64, T ≥ 1; or B texts of any lengths, (T) each.
        max_new_tokens: How many, for each text.
        sampling: How.
        generator: What to draw from; PyTorch's global one, if None.
        slide: By how many tokens the context moves when it is full, from 1 to the model's `block_size`: see above.
        use_cache: Keep keys and values, if the model can; the tokens are the same without, and come later.

    Raises:
        ValueError: `tokens` is not (B, T), or not texts of (T), with at least one token each; or `slide` is no number
            of tokens by which the context could move.
    """
    most = model.block_size
    if slide < 1 or (most is not None and slide > most):
        raise ValueError(f"slide is {slide}; it must be at least 1 and at most block_size, {most}")
    texts = Texts(_check_texts(tokens), most, slide)
    read = _reader(model, texts, max_new_tokens, use_cache)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = draw(read().float(), sampling, generator)
        texts.append(token)
        yield token


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    slide: int = 1,
    use_cache: bool = True,
) -> Tensor:
    """`tokens` (B, T) and what follows them, (B, T + max_new_tokens); see `stream`."""
    new = stream(model, tokens, max_new_tokens, sampling, generator, slide=slide, use_cache=use_cache)
    return torch.cat([tokens, *new], dim=1)


def generate_texts(
    model: LanguageModel,
    texts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    slide: int = 1,
    use_cache: bool = True,
) -> list[Tensor]:
    """Each of `texts`, (T) for whatever T, and what follows it, (T + max_new_tokens), as one batch; see `stream`."""
    new = list(stream(model, texts, max_new_tokens, sampling, generator, slide=slide, use_cache=use_cache))
    return [torch.cat([text, *(token[row] for token in new)]) for row, text in enumerate(texts)]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    slide: int = 1,
    use_cache: bool = True,
) -> Iterator[str]:
    """Yield the text after `prompt`, (1, T), in pieces: one a token, but whole characters only."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream(model, prompt, max_new_tokens, sampling, generator, slide=slide, use_cache=use_cache):
        yield utf8.decode(tokenizer.decode_bytes([int(token)]))
    yield utf8.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """`prompt` as a document of its own, (1, T): after `<|endoftext|>`, if the vocabulary has it.

    Raises:
        ValueError: the prompt is empty and the vocabulary has no token to start from.
    """
    start = [] if tokenizer.start is None else [tokenizer.start]
    ids = [*start, *tokenizer.encode(prompt)]
    if not ids:
        raise ValueError("prompt is empty, and this tokenizer has no token to start from; give at least a character")
    return torch.tensor([ids])


def _check_texts(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tokens, Tensor) and (tokens.ndim != 2 or tokens.shape[1] == 0):
        raise ValueError(f"tokens is {tuple(tokens.shape)}; it must be (B, T) with T at least 1")
    if any(text.ndim != 1 or len(text) == 0 for text in tokens) or len(tokens) == 0:
        raise ValueError(f"tokens is {[tuple(text.shape) for text in tokens]}; it must be (T) each, T at least 1")
    return list(tokens)


def _reader(model: LanguageModel, texts: Texts, max_new_tokens: int, use_cache: bool) -> Callable[[], Tensor]:
    """A function that has the model read what is there of `texts`, and returns the logits (B, V) of what follows."""
    if not (use_cache and isinstance(model, CachingModel)):
        return lambda: _last(model(texts.contexts()[0]), texts.contexts()[1])
    longest = max(texts.lengths) + max_new_tokens
    cache = model.make_cache(len(texts.lengths), min(model.block_size, longest))
    starts: list[int] = []  # of the contexts in the cache, which has all of them but the newest token

    def read_on() -> Tensor:
        nonlocal starts
        if texts.newest is not None and starts == texts.starts:
            return model.next_logits(texts.newest, cache)
        starts = texts.starts
        cache.clear()
        tokens, counts = texts.contexts()
        return model.next_logits(tokens, cache, counts)

    return read_on


def _last(logits: Tensor, counts: Tensor | None) -> Tensor:
    return logits[:, -1] if counts is None else logits[torch.arange(len(counts), device=logits.device), counts - 1]
