"""The tokenizer that a command line names, and the one that a checkpoint describes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from .byte_pair import BytePairTokenizer
from .characters import CharTokenizer
from .interface import Tokenizer
from .published import TIKTOKEN_FILES, TiktokenTokenizer
from .sentence_piece import SentencePieceTokenizer

MODEL_FILE = ".model"  # how the name of a SentencePiece model file ends
NAMES = ("characters", "byte-pair", *TIKTOKEN_FILES)


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "characters" or "byte-pair", which learn their vocabulary from the texts; "gpt2" or "cl100k_base"; or the
            path of a SentencePiece model file, whose name ends with ".model".
        texts: What there is to encode, in pieces; read by those that learn only.
        vocab_size: How many tokens "byte-pair" learns; no other one takes it.

    Raises:
        ValueError: there is no tokenizer of that name, or `vocab_size` is missing or not wanted.
        OSError, ImportError: see the tokenizer's own class.
    """
    if (vocab_size is not None) != (name == "byte-pair"):
        raise ValueError(f"vocab_size is {vocab_size}; with the tokenizer 'byte-pair', and no other, it must be given")
    if name == "characters":
        return CharTokenizer.from_texts(texts)
    if vocab_size is not None:
        return BytePairTokenizer.train(texts, vocab_size)
    if name.endswith(MODEL_FILE):
        return SentencePieceTokenizer.from_file(name)
    if name not in NAMES:
        raise ValueError(f"tokenizer is {name!r}; it must be {', '.join(NAMES)} or a SentencePiece file, *{MODEL_FILE}")
    return TiktokenTokenizer(name)


def tokenizer_from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described; ValueError for anything else."""
    match dict(values):
        case {"kind": "characters", "characters": str(characters), **rest} if not rest:
            return CharTokenizer(characters)
        case {"kind": "byte-pair", "merges": list(merges), **rest} if not rest and all(type(m) is list for m in merges):
            return BytePairTokenizer(merges)
        case {"kind": "tiktoken", "name": str(name), **rest} if not rest:
            return TiktokenTokenizer(name)
        case {"kind": "sentencepiece", "model": str(model), **rest} if not rest:
            return SentencePieceTokenizer(base64.b64decode(model, validate=True))
    raise ValueError(f"{str(dict(values))[:200]} does not describe a tokenizer")
