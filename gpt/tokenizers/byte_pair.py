"""Byte-pair encoding with a vocabulary of the user's own: trained by Hugging Face's tokenizers, read by tiktoken.

Training (Sennrich et al. 2016; on bytes as in GPT-2): begin with the 256 bytes; find the two tokens that stand next to
each other most often; make them one new token, everywhere; repeat. All bytes stay in the vocabulary, so every text can
be written in it. Words are cut apart first, by GPT-2's pattern, and no token crosses a cut.

Encoding is tiktoken's, several times as fast as that of the library that trains. It joins by the token that a pair
makes, where tokenizers goes by the pair itself: the same ids, as long as no two pairs make the same token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from .interface import check_ids

START = "<|endoftext|>"
BYTES = 256
LONGEST_TOKEN = 256  # bytes; a file with longer ones is refused, or 60 merges could ask for 2^60 bytes
# Radford et al. 2019 cut a text so: 's and its like, a word, a number or signs with the space before them, spaces.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LEAST_VOCABULARY = BYTES + 1  # every byte, and <|endoftext|>


class BytePairTokenizer:
    """Ids 0 to 255 are the bytes, 256 + i is what `merges[i]` makes of two tokens before it, the last `<|endoftext|>`.

    Raises:
        ValueError: a merge is not of two tokens before it, or makes a token that is there already, or one of more than
            `LONGEST_TOKEN` bytes.
        ImportError: tiktoken is not installed.
    """

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ImportError("a byte-pair vocabulary needs tiktoken: pip install 'trilby[gpt]'") from None
        self.merges = [tuple(merge) for merge in merges]
        ranks = {token: rank for rank, token in enumerate(_tokens(self.merges))}
        self._encoding = tiktoken.Encoding(
            "byte-pair", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={START: len(ranks)}
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
        """Learn a vocabulary of `vocab_size` tokens, or of fewer where `texts` have no more pairs to join.

        Raises:
            ValueError: `vocab_size` has no room for every byte and `<|endoftext|>`.
            ImportError: tokenizers, or tiktoken, is not installed.
        """
        if vocab_size < LEAST_VOCABULARY:
            raise ValueError(f"vocab_size is {vocab_size}; a byte-pair vocabulary has at least {LEAST_VOCABULARY}")
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        except ImportError:
            raise ImportError("training a byte-pair vocabulary needs tokenizers: pip install 'trilby[gpt]'") from None
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # without <|endoftext|>
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=LONGEST_TOKEN,
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        return cls(_merges(json.loads(trained.to_str())["model"]["merges"]))

    @property
    def vocab_size(self) -> int:
        """256 bytes, the merges, and `<|endoftext|>`."""
        return self._encoding.n_vocab

    @property
    def start(self) -> int:
        """The id of `<|endoftext|>`."""
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; what looks like a special token is ordinary text."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, which may begin or end within a character."""
        check_ids(ids, self.vocab_size)
        return self._encoding.decode_bytes(ids)

    def to_dict(self) -> dict[str, Any]:
        """The merges are the tokenizer."""
        return {"kind": "byte-pair", "merges": [list(merge) for merge in self.merges]}


def _tokens(merges: Sequence[Sequence[Any]]) -> list[bytes]:
    """The bytes of every token, by id."""
    tokens = [bytes([byte]) for byte in range(BYTES)]
    known = set(tokens)
    for merge in merges:
        if len(merge) != 2 or not all(type(part) is int and 0 <= part < len(tokens) for part in merge):
            raise ValueError(f"merge is {merge!r}; it must be two ids from 0 to {len(tokens) - 1}")
        token = tokens[merge[0]] + tokens[merge[1]]
        if token in known or len(token) > LONGEST_TOKEN:
            raise ValueError(f"merge {merge!r} makes a token that is there already, or of over {LONGEST_TOKEN} bytes")
        tokens.append(token)
        known.add(token)
    return tokens


def _merges(pairs: Iterable[tuple[str, str]]) -> list[tuple[int, int]]:
    """The merges that tokenizers learned, by ids; a second way to make a token that is there already is left out."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ids = {bytes([byte]): byte for byte in range(BYTES)}
    merges: list[tuple[int, int]] = []
    for pair in pairs:
        left, right = (bytes(byte_of[character] for character in part) for part in pair)
        if left + right not in ids:
            ids[left + right] = BYTES + len(merges)
            merges.append((ids[left], ids[right]))
    return merges


def byte_characters() -> str:
    """The character that stands for each byte where bytes are written as text: GPT-2's 256, of which none is blank."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(BYTES) if byte not in shown]
    return "".join(chr(BYTES + hidden.index(byte)) if byte in hidden else chr(byte) for byte in range(BYTES))
