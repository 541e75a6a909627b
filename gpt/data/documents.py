"""Documents to batches: no context reaches over the border of a document.

Two ways to make a rectangle of documents of all lengths. Packed, they stand in one row, and attention stops at their
borders; padded, each has a row of its own, with nothing to predict in what is left of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import IGNORED, Batch, check_length, checked_position
from .tokens import Documents, Tokens


class PackedBatches:
    """The text from front to back, and again: B·T+1 ids in a row, cut at documents and where a sequence has T ids.

    T = 3, B = 2, two documents a b and A B C D E, which begin with a and A::

        x       a b A B C D     y  b A B C D E      (`A` after `b` is IGNORED, unless it is <|endoftext|>)
        starts  0   2     5 6

    Raises:
        ValueError: `tokens` has not even B·T+1 ids.
    """

    def __init__(self, tokens: Tokens, documents: Documents, batch_size: int, block_size: int) -> None:
        check_length(tokens, batch_size * block_size + 1, f"{batch_size} blocks of {block_size} ids and one more")
        self.tokens, self.documents = tokens, documents
        self.size, self.block_size = batch_size * block_size, block_size
        self.position = 0

    def next(self) -> Batch:
        """The next x and y, (1, B·T) each, and where the sequences in them begin."""
        if self.position + self.size + 1 > len(self.tokens):
            self.position = 0
        first, self.position = self.position, self.position + self.size
        chunk = self.tokens[torch.arange(first, first + self.size + 1)]
        begun = self.documents.starts
        borders = begun[(begun > first) & (begun <= first + self.size)] - first  # of the documents that begin in here
        x, y = chunk[:-1], chunk[1:].clone()
        if not self.documents.marked:
            y[borders - 1] = IGNORED
        return Batch(x[None], y[None], _cut(borders[borders < self.size].tolist(), self.size, self.block_size))

    def state(self) -> Tensor:
        """The position of the next batch."""
        return torch.tensor([self.position])

    def restore(self, state: Tensor) -> None:
        """Go on from the position `state`; ValueError if it is outside of the text."""
        self.position = checked_position(state, len(self.tokens))


class PaddedBatches:
    """A document a row, and again from the first; one of more than T ids goes on in the next row.

    T = 4, B = 2, documents a b c and A B C D E F::

        x  a b c 0     y  b c - -     (`-` is IGNORED; after `c` comes <|endoftext|>, if the documents begin with it)
           A B C D        B C D E

    Raises:
        ValueError: no document has an id and one after it.
    """

    def __init__(self, tokens: Tokens, documents: Documents, batch_size: int, block_size: int) -> None:
        starts = documents.starts
        ends = torch.cat([starts[1:], torch.tensor([len(tokens)])])
        if documents.marked:  # the <|endoftext|> of the next document ends this one
            ends[:-1] += 1
        self.rows = _rows(starts, ends - 1, block_size)  # (R, 2): where the ids of each row begin and end
        if not len(self.rows):
            raise ValueError(f"tokens is ({len(tokens)},); it must hold a document of at least 2 ids")
        self.tokens = tokens
        self.shape = (batch_size, block_size)
        self.row = 0

    def next(self) -> Batch:
        """The next x and y, (B, T) each."""
        B, T = self.shape
        rows = self.rows[(self.row + torch.arange(B)) % len(self.rows)]
        self.row = (self.row + B) % len(self.rows)
        first, last = rows.unbind(dim=1)
        places = first[:, None] + torch.arange(T)  # (B, T)
        padding = places >= last[:, None]
        chunks = self.tokens[torch.stack([places, places + 1]).clamp(max=len(self.tokens) - 1)]
        return Batch(chunks[0].masked_fill(padding, 0), chunks[1].masked_fill(padding, IGNORED))

    def state(self) -> Tensor:
        """The number of the next row."""
        return torch.tensor([self.row])

    def restore(self, state: Tensor) -> None:
        """Go on from the row `state`; ValueError if there is none of that number."""
        self.row = checked_position(state, len(self.rows) - 1)


def _cut(borders: list[int], size: int, longest: int) -> Tensor:
    """Where sequences begin, and `size`: at 0, at `borders`, and every `longest` ids after one of them."""
    ends = [*borders, size]
    starts = [place for begin, end in zip([0, *borders], ends) for place in range(begin, end, longest)]
    return torch.tensor([*starts, size], dtype=torch.int32)


def _rows(starts: Tensor, ends: Tensor, longest: int) -> Tensor:
    """(R, 2): where rows of at most `longest` ids begin and end; (D) documents go from `starts` to `ends`."""
    counts = ((ends - starts).clamp(min=0) + longest - 1) // longest  # rows of each document
    document = torch.repeat_interleave(counts)
    number = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]  # of the row in its document
    first = starts[document] + number * longest
    return torch.stack([first, torch.minimum(first + longest, ends[document])], dim=1)
