"""What became of compilations, kept in a file, so that an interrupted or repeated compile matrix does none twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import triton

from . import compile as reader
from .call import Call
from .compile import Compilation, options_of, source_of
from .targets import Target


def key_of(call: Call, target: Target) -> str:
    """What an outcome depends on: kernel, types and constants, options, target, compiler and reader."""
    parts = (
        source_of(call).hash(),  # of the functions that the kernel calls, too
        json.dumps(options_of(call), sort_keys=True),
        target.name,
        triton.__version__,
        Path(reader.__file__).read_text(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Ledger:
    """Compilations by key, one JSON line each, without their assembly.

    A line is written as soon as it is known. One that is torn, because the process was killed, is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Compilation] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._read(line)

    def find(self, key: str) -> Compilation | None:
        """What is known of `key`; its assembly is empty."""
        return self._known.get(key)

    def add(self, key: str, name: str, compilation: Compilation) -> None:
        """Write down what became of `key`; `name` is for people who read the file."""
        self._known[key] = dataclasses.replace(compilation, assembly="")
        numbers = {field: value for field, value in vars(compilation).items() if field != "assembly"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + json.dumps({"key": key, "name": name, **numbers}))  # the last line may be a torn one

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        key = record.pop("key")
        del record["name"]
        fields = {field.name for field in dataclasses.fields(Compilation)} - {"assembly"}
        if set(record) == fields:  # else written by another version, whose key nobody asks for
            self._known[key] = Compilation(**record, assembly="")
