"""One id per character: the vocabulary is that of the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .interface import check_ids


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character; `characters[id]` is the character."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError("characters must be at least one, and each once")
        object.__setattr__(self, "_ids", {character: token for token, character in enumerate(self.characters)})

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The vocabulary is the distinct characters of `text`, sorted; ValueError if it has none."""
        return cls.from_texts([text])

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """The vocabulary is the distinct characters of all `texts`, sorted; ValueError if they have none."""
        distinct: set[str] = set()
        for text in texts:
            distinct.update(text)
        return cls("".join(sorted(distinct)))

    @property
    def vocab_size(self) -> int:
        """The number of distinct characters."""
        return len(self.characters)

    @property
    def start(self) -> None:
        """Characters are all that there is."""
        return None

    def encode(self, text: str) -> list[int]:
        """One id per character; ValueError names the first character that is not in the vocabulary, and where."""
        ids: dict[str, int] = self._ids  # type: ignore[attr-defined]
        try:
            return [ids[character] for character in text]
        except KeyError as unknown:
            character = unknown.args[0]
            raise ValueError(
                f"character {character!r} at position {text.index(character)} is not among the"
                f" {self.vocab_size} that this tokenizer knows: {self.characters!r}"
            ) from None

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The characters of `ids`, as UTF-8."""
        check_ids(ids, self.vocab_size)
        return "".join(self.characters[token] for token in ids).encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary is the tokenizer."""
        return {"kind": "characters", "characters": self.characters}
