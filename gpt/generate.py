"""Text from a model: one token at a time, each drawn from what the model expects after all before it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .tokenizers import Tokenizer


class LanguageModel(Protocol):
    """What can be generated from: a `GPT`, a `Bigram`, or anything else that has logits for the next token."""

    @property
    def block_size(self) -> int | None:
        """The longest context that it reads, None if there is no limit."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; the defaults draw from the model's own distribution.

    Raises ValueError for a temperature below 0, a top_k below 1 or a top_p outside of (0, 1].
    """

    temperature: float = 1.0  # below 1 sharper, above 1 flatter; 0 is greedy: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the fewest tokens that are together as likely as p (nucleus sampling)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


GREEDY = Sampling(temperature=0.0)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution, (B, V), that the next token is drawn from, given the `logits` (B, V).

    In this order: temperature, top-k, top-p. Equally likely tokens at the border of top-k all stay; of those at the
    border of top-p, the ones with lower ids. Greedy puts everything on the first of the likeliest tokens.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(dim=1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, ids = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered  # how much is likelier than each
        kept = torch.where(before < sampling.top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, ids, kept)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return probabilities


def stream(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield each new token, (B, 1), as soon as it is there.

    Args:
        model: In evaluation mode, if it has dropout.
        tokens: (B, T) int64, T ≥ 1; of more than the model's `block_size`, it reads the last.
        max_new_tokens: How many.
        sampling: How.
        generator: What to draw from; PyTorch's global one, if None.

    Raises:
        ValueError: `tokens` is not (B, T) with at least one position.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens is {tuple(tokens.shape)}; it must be (B, T) with T at least 1")
    for _ in range(max_new_tokens):
        with torch.no_grad():
            context = tokens if model.block_size is None else tokens[:, -model.block_size :]
            probabilities = next_token_probabilities(model(context)[:, -1].float(), sampling)
            token = torch.multinomial(probabilities, num_samples=1, generator=generator)
        tokens = torch.cat([tokens, token], dim=1)
        yield token


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """`tokens` (B, T) and what follows them, (B, T + max_new_tokens); see `stream`."""
    return torch.cat([tokens, *stream(model, tokens, max_new_tokens, sampling, generator)], dim=1)


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the text after `prompt`, (1, T), in pieces: one a token, but whole characters only."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream(model, prompt, max_new_tokens, sampling, generator):
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
