"""Where a text comes from."""

from __future__ import annotations

import os
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A text and where it is from."""

    source: str
    content: str


def read_text(path: str | Path) -> Text:
    """The UTF-8 text in the file at `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or not UTF-8.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not content:
        raise ValueError(f"{path} is empty")
    return Text(str(path), content)


def default_text() -> Text:
    """The text to train on when none is named, without a network.

    In this order: the file that the environment variable `TRILBY_TEXT` names; tinyshakespeare, if it has been saved
    as `tinyshakespeare_path()`; the prose of Python's own language reference, which every Python carries.
    """
    if os.environ.get("TRILBY_TEXT"):
        return read_text(os.environ["TRILBY_TEXT"])
    if tinyshakespeare_path().is_file():
        return read_text(tinyshakespeare_path())
    return Text("pydoc_data.topics", "\n\n".join(pydoc_data.topics.topics.values()))


def tinyshakespeare_path() -> Path:
    """Where a user saves tinyshakespeare: `trilby/tinyshakespeare.txt` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilby" / "tinyshakespeare.txt"
