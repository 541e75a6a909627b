"""What a GPT remembers of the tokens that it has read, so that reading on costs the new tokens alone.

Attention is the only layer in which a token meets others, and what it asks of them is their keys and values. These do
not change once computed, because no token looks at a later one; so they are kept, in memory that is there from the
start, and nothing moves when a token joins::

    keys of a layer, (B, H, S, D)        S = 8 places
    sequence 0      k k k k k · · ·      lengths[0] = 5
    sequence 1      k k k · · · · ·      lengths[1] = 3

Sequences of different lengths begin together and end apart. What an empty place holds is nobody's concern: attention is
told by `key_lengths` not to look, and the next token's key is written over it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from trilby.kernels import DecoderWeights

from .config import GPTConfig


class Places(NamedTuple):
    """Where T tokens go."""

    start: int  # of the longest sequence: the tokens that it had before
    stop: int  # and has with these; no sequence has a place after it
    positions: Tensor  # of each token in its sequence: (T), the same for all, or (B, T)
    key_lengths: Tensor | None  # (B) int32, the places of each sequence that are taken then; None: `stop` in all


class LayerCache(NamedTuple):
    """The keys and values of one layer, and where the next ones go."""

    memory: Tensor  # (2, B, H, S, D): a key and its value are written at once, which halves what a token costs here
    places: Places

    def extend(self, new: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in keys and values, (2, B, H, T, D); return all, (B, H, stop, D) each, and `key_lengths`."""
        start, stop, positions, key_lengths = self.places
        if key_lengths is None:
            self.memory[:, :, :, start:stop] = new
        else:
            sequences = torch.arange(new.shape[1], device=new.device)[:, None]
            # (2, H, B, T, D): the sequence and the position are one place
            self.memory.transpose(1, 2)[:, :, sequences, positions] = new.transpose(1, 2)
        keys, values = self.memory[:, :, :, :stop].unbind()
        return keys, values, key_lengths


class Reading(NamedTuple):
    """T tokens on their way into a cache, for the length of one forward pass."""

    places: Places
    memory: Tensor  # (n_layer, 2, B, H, S, D)
    layers: tuple[LayerCache, ...]


class Cache:
    """Keys and values of every layer, for B sequences of at most `size` tokens each.

    Args:
        config: Of the model that reads.
        batch_size: B.
        size: S, the most tokens that a sequence will have; the model's `block_size`, if None.
        dtype: What the model computes in.
        device: Where it computes.

    Raises:
        ValueError: `size` is not in 1 … `block_size`.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        size = config.block_size if size is None else size
        if not 1 <= size <= config.block_size:
            raise ValueError(f"size is {size}; it must be at least 1 and at most block_size, {config.block_size}")
        shape = (config.n_layer, 2, batch_size, config.n_head, size, config.n_embd // config.n_head)
        # Zeros, which cost nothing until the first token comes: attention that masks would let a stray NaN through.
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = self._memory.unbind()
        self._all_positions = torch.arange(size, device=device)
        self.batch_size = batch_size
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget all tokens, and the weights that they were read with."""
        self.weights: DecoderWeights | None = None  # None: not asked for yet
        self.length = 0  # of the longest sequence
        self.lengths: Tensor | None = None  # (B) int32, of each; None while they are all equally long

    def begin(self, tokens: Tensor) -> Reading:
        """Read `tokens`, (B, T), after those that are here; until `finish`, nothing counts as kept.

        ValueError if they are not as many sequences as the cache is for, or do not fit in.
        """
        B, T = tokens.shape
        start, stop = self.length, self.length + T
        if self.batch_size != B:
            raise ValueError(f"tokens is {tuple(tokens.shape)}; this cache is for {self.batch_size} sequences")
        if stop > self.size:
            raise ValueError(f"tokens is {tuple(tokens.shape)}; the cache has {start} and no room beyond {self.size}")
        if self.lengths is None:
            places = Places(start, stop, self._all_positions[start:stop], None)
        else:
            positions = self.lengths[:, None] + self._all_positions[:T]
            places = Places(start, stop, positions, self.lengths + T)
        return Reading(places, self._memory, tuple(LayerCache(memory, places) for memory in self._layers))

    def finish(self, reading: Reading, counts: Tensor | None = None) -> None:
        """Keep what was read: all of each row, or the first `counts`, (B), of it, the rest being padding."""
        start, stop = reading.places.start, reading.places.stop
        if self.lengths is None:
            if counts is None:
                self.length = stop
                return
            self.lengths = torch.full_like(counts, start)
        self.lengths = (self.lengths + (stop - start if counts is None else counts)).to(torch.int32)
        self.length = int(self.lengths.max())
