"""Ids to batches: how chunks of a text become x and y."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .tokens import Tokens

IGNORED = -100  # a target that is not to be predicted, as in `F.cross_entropy`


class Batch(NamedTuple):
    """What a model reads, and what it is to predict."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64: y[b, t] is what comes after x[b, 0..t], or IGNORED
    starts: Tensor | None = None  # (N + 1) int32, if B = 1 and the row is N sequences: where each begins, and T

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        x, y = (part.to(device, non_blocking=True) for part in (self.x, self.y))
        return Batch(x, y, None if self.starts is None else self.starts.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a CUDA device can copy from by itself."""
        return Batch(
            self.x.pin_memory(), self.y.pin_memory(), None if self.starts is None else self.starts.pin_memory()
        )


class Batches(Protocol):
    """An endless supply of batches that can be stopped and taken up again."""

    def next(self) -> Batch:
        """The next batch."""

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

    def __init__(self, tokens: Tokens, batch_size: int, block_size: int, generator: torch.Generator) -> None:
        check_length(tokens, block_size + 1, f"a block of {block_size} ids and the one after it")
        self.tokens = tokens
        self.shape = (batch_size, block_size)
        self.generator = generator

    def next(self) -> Batch:
        """The next x and y, (B, T) each."""
        B, T = self.shape
        starts = torch.randint(len(self.tokens) - T, (B,), generator=self.generator)
        chunks = self.tokens[starts[:, None] + torch.arange(T + 1)]  # (B, T+1)
        return Batch(chunks[:, :-1], chunks[:, 1:])

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

    def __init__(self, tokens: Tokens, batch_size: int, block_size: int) -> None:
        check_length(tokens, batch_size * block_size + 1, f"{batch_size} blocks of {block_size} ids and one more")
        self.tokens = tokens
        self.shape = (batch_size, block_size)
        self.position = 0

    def next(self) -> Batch:
        """The next x and y, (B, T) each."""
        B, T = self.shape
        if self.position + B * T + 1 > len(self.tokens):
            self.position = 0
        chunk = self.tokens[torch.arange(self.position, self.position + B * T + 1)]
        self.position += B * T
        return Batch(chunk[:-1].view(B, T), chunk[1:].view(B, T))

    def state(self) -> Tensor:
        """The position of the next batch."""
        return torch.tensor([self.position])

    def restore(self, state: Tensor) -> None:
        """Go on from the position `state`; ValueError if it is outside of the text."""
        self.position = checked_position(state, len(self.tokens))


def checked_position(state: Tensor, N: int) -> int:
    """The position from 0 to N that `state` is; ValueError if it is none."""
    if state.shape != (1,) or not 0 <= int(state) <= N:
        raise ValueError(f"state is {state.tolist()}; it must be one position from 0 to {N}")
    return int(state)


def check_length(tokens: Tokens, least: int, reason: str) -> None:
    """ValueError unless there are at least `least` ids, for this `reason`."""
    if len(tokens) < least:
        raise ValueError(f"tokens is ({len(tokens)},); it must be (N,) with N at least {least}: {reason}")
