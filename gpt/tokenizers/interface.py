"""What every tokenizer can do, and what can be done with every tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 ≤ id < vocab_size."""

    @property
    def start(self) -> int | None:
        """The id that every document starts with (`<|endoftext|>`), None if the vocabulary has none."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, all of it ordinary text; ValueError if it cannot be written in this vocabulary."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of `ids`; one id may hold a part of a character only. ValueError for an id that there is not."""

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this tokenizer, ready for JSON; `tokenizer_from_dict` reads it."""


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> list[int]:
    """The ids of all documents in a row, each after `<|endoftext|>` if the vocabulary has it."""
    ids: list[int] = []
    for document in documents:
        if tokenizer.start is not None:
            ids.append(tokenizer.start)
        ids.extend(tokenizer.encode(document))
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`; bytes that are no character of their own become U+FFFD."""
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """ValueError for the first of `ids` that is outside of 0 ≤ id < vocab_size."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"id is {token}; this vocabulary has 0 to {vocab_size - 1}")
