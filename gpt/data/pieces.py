"""A text in pieces: files larger than memory, cut where every tokenizer cuts anyway."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PIECE_BYTES = 4 * 2**20
# A file without a line to cut at is cut here all the same, for it may be larger than memory: one token may change.
LONGEST_PIECE_BYTES = 16 * PIECE_BYTES
# After a single line break between two other characters: no pattern of words, and no piece, goes on from there.
BORDER = re.compile(r"(?<=\S)\r?\n(?=\S)")


class Piece(NamedTuple):
    """A part of a file, decoded."""

    text: str
    end: int  # the byte in the file after it


def read_pieces(path: str | Path, offset: int = 0, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    r"""The UTF-8 text in the file at `path` from byte `offset` on, line breaks as "\n", some `piece_bytes` at a time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    with Path(path).open("rb") as file:
        file.seek(offset)
        unread = b""
        while True:
            block = file.read(piece_bytes)
            unread += block
            text = _decode(unread, path, offset, final=not block)
            cut = _last_border(text) if block else len(text)
            if not cut and len(unread) >= LONGEST_PIECE_BYTES // PIECE_BYTES * piece_bytes:
                cut = len(text) - text.endswith("\r")  # which may be half of a line break
            if cut:
                length = len(text[:cut].encode("utf-8"))
                offset, unread = offset + length, unread[length:]
                yield Piece(text[:cut].replace("\r\n", "\n").replace("\r", "\n"), offset)
            if not block:
                return


def texts_of(paths: Iterable[str | Path]) -> Iterator[str]:
    """Every piece of every file, for a tokenizer to learn from."""
    return (piece.text for path in paths for piece in read_pieces(path))


def _last_border(text: str) -> int:
    """The place after the last line break to cut at, 0 if there is none."""
    line = len(text)
    while (line := text.rfind("\n", 0, line)) > 0:
        if BORDER.match(text, line) or BORDER.match(text, line - 1):
            return line + 1
    return 0


def _decode(unread: bytes, path: str | Path, offset: int, final: bool) -> str:
    try:
        return codecs.utf_8_decode(unread, "strict", final)[0]
    except UnicodeDecodeError as error:
        byte, place = unread[error.start], offset + error.start
        raise ValueError(f"{path} is not UTF-8 text: byte {byte:#x} at {place}: {error.reason}") from None
