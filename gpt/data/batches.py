"""Ids to batches: how chunks of a text become x and y.

A batch is a pair of (B, T) tensors: `x` is what the model reads and `y[b, t]` is what comes after `x[b, 0..t]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """An endless supply of batches that can be stopped and taken up again."""

    def next(self) -> tuple[Tensor, Tensor]:
        """The next x and y, (B, T) each."""

    def state(self) -> Tensor:
        """Where the supply is now."""

    def restore(self, state: Tensor) -> None:
        """Go on from `state`."""


class RandomBatches:
    """Chunks that start anywhere, each place equally likely.

    The places are drawn as `torch.randint(len(tokens) - T, (B,), generator=generator)`, one draw per batch.

    Raises:
        ValueError: `tokens` has not more than T ids.
    """

    def __init__(self, tokens: Tensor, batch_size: int, block_size: int, generator: torch.Generator) -> None:
        _check_length(tokens, block_size + 1, f"a block of {block_size} ids and the one after it")
        self.tokens = tokens
        self.shape = (batch_size, block_size)
        self.generator = generator

    def next(self) -> tuple[Tensor, Tensor]:
        """The next x and y, (B, T) each."""
        B, T = self.shape
        starts = torch.randint(len(self.tokens) - T, (B,), generator=self.generator)
        chunks = self.tokens[starts[:, None] + torch.arange(T + 1)]  # (B, T+1)
        return chunks[:, :-1], chunks[:, 1:]

    def state(self) -> Tensor:
        """The state of the generator."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on drawing from `state`."""
        self.generator.set_state(state)


class ContiguousBatches:
    """The text from front to back, and again: each batch is B·T+1 ids in a row, of which the next begins with the last.

    T = 4, B = 2, nine ids a…i::

        x  a b c d     y  b c d e
           e f g h        f g h i

    Raises:
        ValueError: `tokens` has not even B·T+1 ids.
    """

    def __init__(self, tokens: Tensor, batch_size: int, block_size: int) -> None:
        _check_length(tokens, batch_size * block_size + 1, f"{batch_size} blocks of {block_size} ids and one more")
        self.tokens = tokens
        self.shape = (batch_size, block_size)
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """The next x and y, (B, T) each."""
        B, T = self.shape
        if self.position + B * T + 1 > len(self.tokens):
            self.position = 0
        chunk = self.tokens[self.position : self.position + B * T + 1]
        self.position += B * T
        return chunk[:-1].view(B, T), chunk[1:].view(B, T)

    def state(self) -> Tensor:
        """The position of the next batch."""
        return torch.tensor([self.position])

    def restore(self, state: Tensor) -> None:
        """Go on from the position `state`; ValueError if it is outside of the text."""
        if state.shape != (1,) or not 0 <= int(state) <= len(self.tokens):
            raise ValueError(f"state is {state.tolist()}; it must be one position from 0 to {len(self.tokens)}")
        self.position = int(state)


def make_batches(sampler: str, tokens: Tensor, batch_size: int, block_size: int, seed: int) -> Batches:
    """The supply called `sampler`: "random", drawing from `seed`, or "contiguous"."""
    makers: dict[str, Callable[[], Batches]] = {
        "random": lambda: RandomBatches(tokens, batch_size, block_size, torch.Generator().manual_seed(seed)),
        "contiguous": lambda: ContiguousBatches(tokens, batch_size, block_size),
    }
    if sampler not in makers:
        raise ValueError(f"sampler is {sampler!r}; allowed are {', '.join(makers)}")
    return makers[sampler]()


def _check_length(tokens: Tensor, least: int, reason: str) -> None:
    if tokens.ndim != 1 or len(tokens) < least:
        raise ValueError(f"tokens is {tuple(tokens.shape)}; it must be (N,) with N at least {least}: {reason}")
