"""Safetensors files: numbers and JSON, never code; written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def reading(path: Path, error: type[ValueError]) -> Iterator[Any]:
    """The safetensors file at `path`, open; what goes wrong in it is an `error`.

    Raises:
        OSError: the file cannot be read.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path} needs safetensors to be read: pip install 'trilby[gpt]'") from None
    with path.open("rb"):
        pass  # a file that is not there, or not ours to read, is the system's error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as damage:
        raise error(f"{path} is not a safetensors file, or a damaged one: {damage}") from None


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, contiguous and on a CPU, to the file at `path`, which is at every moment the old or the new one.

    Raises:
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(f"{path} needs safetensors to be written: pip install 'trilby[gpt]'") from None

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(dict(tensors), unfinished, dict(metadata))
        _to_disk(unfinished)  # the bytes must be there before the name is
        os.replace(unfinished, path)
        _to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Have the system write what it still holds in memory of a file, or of the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
