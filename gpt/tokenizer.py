"""Text to token ids and back: one interface, by characters or by a published byte-pair vocabulary.

Nothing here opens a network connection. A published vocabulary is read from tiktoken's own cache, and where it is not
there the error says what to run.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        return cls("".join(sorted(set(text))))

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
        _check_ids(ids, self.vocab_size)
        return "".join(self.characters[token] for token in ids).encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary is the tokenizer."""
        return {"kind": "characters", "characters": self.characters}


# The files of each vocabulary in tiktoken's cache: name there (SHA-1 of where it is published), SHA-256 of its bytes.
# tiktoken downloads, unasked, what is missing or broken; so both are looked at before it is called.
TIKTOKEN_FILES: dict[str, dict[str, str]] = {
    "gpt2": {
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "cl100k_base": {
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    },
}


class TiktokenTokenizer:
    """A published byte-pair vocabulary, read by tiktoken: "gpt2" or "cl100k_base".

    Raises:
        ValueError: `name` is not one of these.
        ImportError: tiktoken is not installed.
        FileNotFoundError: the vocabulary is not on this machine, or broken; the message says what to run.
    """

    def __init__(self, name: str) -> None:
        if name not in TIKTOKEN_FILES:
            raise ValueError(f"vocabulary is {name!r}; known are {', '.join(TIKTOKEN_FILES)}")
        try:
            import tiktoken
        except ImportError:
            raise ImportError(
                f"the {name} vocabulary needs tiktoken: pip install 'trilby[gpt]', or use characters"
            ) from None
        folder = tiktoken_cache()
        if not vocabulary_is_cached(name, folder):
            raise FileNotFoundError(
                f"the {name} vocabulary is not in {folder}. To download it once, where there is a network, run\n"
                f"    TIKTOKEN_CACHE_DIR={folder} python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"\n"
                "or set TIKTOKEN_CACHE_DIR to a folder that has it."
            )
        self.name = name
        self._encoding = tiktoken.get_encoding(name)

    @property
    def vocab_size(self) -> int:
        """50257 for gpt2, 100277 for cl100k_base."""
        return self._encoding.n_vocab

    @property
    def start(self) -> int:
        """The id of `<|endoftext|>`."""
        return self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; what looks like a special token is ordinary text."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which may begin or end within a character."""
        _check_ids(ids, self.vocab_size)
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError as unknown:  # cl100k_base leaves a few ids without a meaning
            raise ValueError(f"id {unknown} stands for nothing in {self.name}") from None

    def to_dict(self) -> dict[str, Any]:
        """The name is enough; the vocabulary stays tiktoken's."""
        return {"kind": "tiktoken", "name": self.name}


def tokenizer_from_dict(values: Mapping[str, Any]) -> CharTokenizer | TiktokenTokenizer:
    """The tokenizer that `to_dict` described; ValueError for anything else."""
    match dict(values):
        case {"kind": "characters", "characters": str(characters), **rest} if not rest:
            return CharTokenizer(characters)
        case {"kind": "tiktoken", "name": str(name), **rest} if not rest:
            return TiktokenTokenizer(name)
    raise ValueError(f"{dict(values)!r} does not describe a tokenizer")


def make_tokenizer(name: str, text: str) -> CharTokenizer | TiktokenTokenizer:
    """The tokenizer called `name`: "characters", with the vocabulary of `text`, or a published one."""
    return CharTokenizer.from_text(text) if name == "characters" else TiktokenTokenizer(name)


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


def tiktoken_cache() -> Path:
    """Where tiktoken keeps its vocabularies: `TIKTOKEN_CACHE_DIR`, or its own default.

    FileNotFoundError if the variable is there but empty, which tells tiktoken to download every time.
    """
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        folder = os.environ.get(variable)
        if folder == "":
            raise FileNotFoundError(f"{variable} is empty; it must name the folder of tiktoken's vocabularies")
        if folder is not None:
            return Path(folder)
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def vocabulary_is_cached(name: str, folder: Path) -> bool:
    """Whether `folder` has every file of the vocabulary, whole."""
    paths = {folder / file: sha256 for file, sha256 in TIKTOKEN_FILES[name].items()}
    return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha for path, sha in paths.items())


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"id is {token}; this vocabulary has 0 to {vocab_size - 1}")
