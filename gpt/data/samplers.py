"""The supplies of batches, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from .batches import Batches, ContiguousBatches, RandomBatches
from .documents import PackedBatches, PaddedBatches
from .tokens import Documents, Split

Sampler = Literal["random", "contiguous", "packed", "padded"]


def make_batches(sampler: str, tokens: Split, batch_size: int, block_size: int, seed: int) -> Batches:
    """The supply of the training part called `sampler`.

    - "random": chunks from anywhere, drawing from `seed`
    - "contiguous": the text from front to back
    - "packed": so too, but no context reaches over the border of a document
    - "padded": a document a row
    """
    train, shape = tokens.train, (batch_size, block_size)
    documents = tokens.documents or Documents(torch.zeros(1, dtype=torch.int64), marked=False)
    makers: dict[str, Callable[[], Batches]] = {
        "random": lambda: RandomBatches(train, *shape, torch.Generator().manual_seed(seed)),
        "contiguous": lambda: ContiguousBatches(train, *shape),
        "packed": lambda: PackedBatches(train, documents, *shape),
        "padded": lambda: PaddedBatches(train, documents, *shape),
    }
    if sampler not in makers:
        raise ValueError(f"sampler is {sampler!r}; allowed are {', '.join(makers)}")
    return makers[sampler]()
