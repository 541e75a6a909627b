"""The ids of a text: where they are, which of them are for training, and where documents begin."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .mapped import MappedTokens

TRAIN_SHARE = 0.9

Tokens: TypeAlias = Tensor | MappedTokens  # the ids of a text, (N): int64 in memory, or a token file's


class Documents(NamedTuple):
    """Where the documents of a text begin."""

    starts: Tensor  # (D) int64, ascending, the first 0
    marked: bool  # each begins with <|endoftext|>, which thereby is also what comes after the one before it


class Split(NamedTuple):
    """The ids of a text: the first nine tenths to train on, the rest to validate with."""

    train: Tokens
    validation: Tokens
    documents: Documents | None = None  # of the part to train on; None: it is one document


def split(tokens: list[int] | Tokens, documents: Documents | None = None) -> Split:
    """The first nine tenths of `tokens`, (N), and the rest."""
    if isinstance(tokens, list):
        tokens = torch.tensor(tokens, dtype=torch.int64)
    border = int(TRAIN_SHARE * len(tokens))
    if documents is not None:
        documents = documents._replace(starts=documents.starts[documents.starts < border])
    return Split(tokens[:border], tokens[border:], documents)


def fingerprint(tokens: Split) -> str:
    """SHA-256 of the ids of a text and of where its documents begin, by which a checkpoint knows it again."""
    digest = hashlib.sha256()
    for part in (tokens.train, tokens.validation):
        # A token file knows its own sum, since it may be larger than memory.
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else part.sha256.encode())
    if tokens.documents is not None:
        digest.update(tokens.documents.starts.numpy().tobytes())
    return digest.hexdigest()


def largest_id(tokens: Split) -> int:
    """The largest id of a text, 0 if there are none; a token file says it of all that it holds."""
    parts = [part for part in (tokens.train, tokens.validation) if len(part)]
    return max((int(part.max()) if isinstance(part, Tensor) else part.largest for part in parts), default=0)
