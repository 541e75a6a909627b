"""Token files: texts that are tokenized once, and read from the disk as if they were in memory.

A token file is a folder of three files: `ids`, the ids in a row, 2 bytes each where the vocabulary allows it, else 4;
`documents`, where each document begins, 8 bytes each; `tokens.json`, what they were made from and how far that went.
It is written a piece of text at a time, and tokens.json after each, so whoever is killed goes on after the last piece.
Reading maps the ids into memory: the system loads what is asked for, and drops what memory has no room for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..tokenizers import Tokenizer
from .mapped import MappedTokens
from .pieces import read_pieces
from .tokens import Documents, Split, split

FORMAT = 1
IDS, DOCUMENTS, HEADER = "ids", "documents", "tokens.json"
HASHED_AT_ONCE = 16 * 2**20  # bytes


class TokenFileError(ValueError):
    """A folder that is not a token file, or not a whole one."""


@dataclass(frozen=True)
class Header:
    """What a token file is made from, and how far: everything before `offset` of the file number `file` is in it."""

    tokenizer: str  # SHA-256 of its description
    files: tuple[tuple[str, int, int], ...]  # path, bytes, time of the last change in ns
    itemsize: int  # bytes of an id
    start: int | None  # the id that every document begins with
    file: int = 0
    offset: int = 0
    ids: int = 0
    documents: int = 0
    largest: int = 0  # id
    sha256: str = ""  # of the ids, when they are all there
    format: int = field(default=FORMAT, kw_only=True)

    @property
    def source(self) -> tuple[Any, ...]:
        """What must be the same for the work to go on."""
        return self.tokenizer, self.files, self.itemsize, self.start, self.format


def write_token_file(
    folder: str | Path,
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> TokenFile:
    """Tokenize the files at `paths`, a document each, into the folder; or as much of it as is not there already.

    What is in the folder from other files, or of another tokenizer, is written anew.

    Args:
        folder: Where to; made, if it is not there.
        paths: UTF-8 texts; each may be larger than memory.
        tokenizer: What with.
        on_bytes: Told after every piece how many bytes of how many are done.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file is not UTF-8, they are all empty, or hold what the tokenizer has no id for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = _begin(paths, tokenizer)
    try:
        found = _read_header(folder)
        header = found if found.source == header.source else header
    except (OSError, TokenFileError):
        pass  # nothing there to go on with
    if not header.sha256:
        header = _write_ids(folder, header, tokenizer, on_bytes)
        if not header.ids:
            raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
        _write_header(folder, replace(header, sha256=_sha256(folder / IDS)))
    return TokenFile.open(folder)


class TokenFile:
    """A whole token file, (N) ids.

    Raises:
        OSError: the folder, or a file in it, cannot be read.
        TokenFileError: it is not a whole token file.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.header = header
        ids = np.memmap(folder / IDS, _dtype(header.itemsize), mode="r")
        self.tokens = MappedTokens(np.asarray(ids), header.largest, header.sha256)
        starts = torch.from_numpy(np.fromfile(folder / DOCUMENTS, np.int64))
        self.documents = Documents(starts, marked=header.start is not None)

    @classmethod
    def open(cls, folder: str | Path) -> TokenFile:
        """The token file in `folder`."""
        folder = Path(folder)
        header = _read_header(folder)
        if not header.sha256:
            raise TokenFileError(f"{folder} is not a whole token file yet; write_token_file goes on with it")
        for name, size in ((IDS, header.ids * header.itemsize), (DOCUMENTS, header.documents * 8)):
            if (found := (folder / name).stat().st_size) != size:
                raise TokenFileError(f"{folder / name} has {found} bytes; {HEADER} says {size}")
        return cls(folder, header)

    def split(self) -> Split:
        """The first nine tenths of the ids, and the rest."""
        return split(self.tokens, self.documents)


def _begin(paths: Sequence[str | Path], tokenizer: Tokenizer) -> Header:
    description = json.dumps(tokenizer.to_dict(), sort_keys=True)
    files = []
    for path in paths:
        status = os.stat(path)
        files.append((str(Path(path).absolute()), status.st_size, status.st_mtime_ns))
    return Header(
        tokenizer=hashlib.sha256(description.encode()).hexdigest(),
        files=tuple(files),
        itemsize=2 if tokenizer.vocab_size <= 2**16 else 4,
        start=tokenizer.start,
    )


def _write_ids(folder: Path, header: Header, tokenizer: Tokenizer, on_bytes: Callable[[int, int], None]) -> Header:
    """Everything that `header` says is not there yet; the header of it all, but for its sum."""
    sizes = [size for _, size, _ in header.files]
    sizes = [size for _, size, _ in header.files]
    ids_before, documents_before = header.ids * header.itemsize, header.documents * 8
    with _after(folder / IDS, ids_before) as ids, _after(folder / DOCUMENTS, documents_before) as documents:
        while header.file < len(header.files):
            for piece in read_pieces(header.files[header.file][0], header.offset):
                new = tokenizer.encode(piece.text)
                if header.offset == 0:
                    new = new if tokenizer.start is None else [tokenizer.start, *new]
                    documents.write(np.array([header.ids], np.int64).tobytes())
                ids.write(np.array(new, _dtype(header.itemsize)).tobytes())
                header = _advanced(header, new, piece.end)
                for file in (documents, ids):  # the numbers must be on the disk before the header that counts them
                    file.flush()
                    os.fsync(file.fileno())
                _write_header(folder, header)
                on_bytes(sum(sizes[: header.file]) + header.offset, sum(sizes))
            header = replace(header, file=header.file + 1, offset=0)
    return header


def _advanced(header: Header, new: list[int], offset: int) -> Header:
    """`header` with the `new` ids counted, which go up to `offset` in their file."""
    return replace(
        header,
        offset=offset,
        ids=header.ids + len(new),
        documents=header.documents + (header.offset == 0),
        largest=max(header.largest, *new),
    )


@contextmanager
def _after(path: Path, size: int) -> Iterator[BinaryIO]:
    """The file at `path` to write on after its first `size` bytes; what a killed writer left after them is cut off."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        yield file


def _write_header(folder: Path, header: Header) -> None:
    """Write tokens.json, which is at every moment the old one or the new one."""
    unfinished = folder / f".{HEADER}.unfinished"
    unfinished.write_text(json.dumps(asdict(header)), encoding="utf-8")
    os.replace(unfinished, folder / HEADER)


def _read_header(folder: Path) -> Header:
    try:
        values = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        files = tuple((str(path), int(size), int(changed)) for path, size, changed in values.pop("files"))
        header = Header(files=files, **values)
        counts = (header.file, header.offset, header.ids, header.documents, header.largest)
        if header.format != FORMAT or header.itemsize not in (2, 4) or any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"format {header.format}, itemsize {header.itemsize}, counts {counts}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TokenFileError(f"{folder / HEADER} does not describe a token file: {error}") from None
    return header


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _dtype(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"<u{itemsize}")
