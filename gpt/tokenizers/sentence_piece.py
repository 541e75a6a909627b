"""The vocabulary in a SentencePiece model file (Kudo and Richardson 2018), read by the package sentencepiece."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .interface import check_ids

SPACE = "\u2581"  # how a piece writes a space
NOTHING = "\ufffd"  # what an id that stands for nothing is shown as


class SentencePieceTokenizer:
    """The vocabulary and the normalization in `model`, the bytes of a SentencePiece model file.

    SentencePiece normalizes what it reads: most models join white space, line breaks included, to one space, and put
    one before the text. Decoding gives back the normalized text.

    Raises:
        ValueError: `model` is not such a file.
        ImportError: sentencepiece is not installed.
    """

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise ImportError("a SentencePiece model needs sentencepiece: pip install sentencepiece") from None
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"model is not a SentencePiece model file: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePieceTokenizer:
        """The tokenizer in the file at `path`; OSError if it cannot be read."""
        try:
            return cls(Path(path).read_bytes())
        except ValueError:
            raise ValueError(f"{path} is not a SentencePiece model file") from None

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return int(self._processor.vocab_size())

    @property
    def start(self) -> int | None:
        """The id of the piece `<|endoftext|>` or of the model's beginning of a sentence, None if it has neither."""
        named = int(self._processor.piece_to_id("<|endoftext|>"))
        found = named if named != self._processor.unk_id() else int(self._processor.bos_id())
        return found if found >= 0 else None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, normalized; ValueError names the first piece of it that the vocabulary does not have."""
        ids: list[int] = self._processor.encode(text)
        unknown = self._processor.unk_id()
        if unknown in ids:
            piece = self._processor.encode(text, out_type=str)[ids.index(unknown)]
            raise ValueError(f"{piece!r} is not among the {self.vocab_size} pieces that this tokenizer knows")
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The pieces of `ids` in UTF-8; a piece of bytes may hold a part of a character only."""
        check_ids(ids, self.vocab_size)
        return b"".join(map(self._bytes, ids))

    def to_dict(self) -> dict[str, Any]:
        """The model file is the tokenizer."""
        return {"kind": "sentencepiece", "model": base64.b64encode(self.model).decode("ascii")}

    def _bytes(self, token: int) -> bytes:
        processor = self._processor
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # written <0x41>
        if processor.is_control(token):
            return b""
        return (NOTHING if processor.is_unknown(token) else piece.replace(SPACE, " ")).encode("utf-8")
