"""Launch parameters that `python -m trilby.kernels.gpu tune` measured on a user's GPU, in place of the tables' own.

They hold only where the environment variable TRILBY_LAUNCH_TABLE names the file: nothing is ever measured, written or
taken up on its own, so that results are the same on every machine that does not ask for others.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "TRILBY_LAUNCH_TABLE"
SCHEMA = 1

Place = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Measured:
    """What was found best in place of one row of a table, for one target.

    Attributes:
        table: Name of the table.
        target: Name of the GPU's architecture.
        arithmetic: Of the row; "" where the table has none.
        size: The row's head dimension or width.
        q_len: The row's longest query; 0 where the table has none.
        numbers: The row's launch parameters, by name.
        reason: What was measured.
    """

    table: str
    target: str
    arithmetic: str
    size: int
    q_len: int
    numbers: Mapping[str, int]
    reason: str

    @property
    def place(self) -> Place:
        """What it stands in place of."""
        return self.table, self.target, self.arithmetic, self.size, self.q_len


_trial: ContextVar[Measured | None] = ContextVar("_trial", default=None)


@contextmanager
def trying(measured: Measured) -> Iterator[None]:
    """Launch with `measured`, whatever the file says: so candidates are measured in the very calls that users make."""
    token = _trial.set(measured)
    try:
        yield
    finally:
        _trial.reset(token)


def measured_numbers(place: Place) -> Mapping[str, int] | None:
    """The launch parameters measured in place of a table's row; None: the row's own hold.

    Raises:
        ValueError: The file that TRILBY_LAUNCH_TABLE names is missing, or is none that `tune` wrote.
    """
    trial = _trial.get()
    if trial is not None and trial.place == place:
        return trial.numbers
    path = os.environ.get(VARIABLE)
    found = _file(path).get(place) if path else None
    return None if found is None else found.numbers


@functools.cache
def _file(path: str) -> dict[Place, Measured]:
    return {each.place: each for each in read(Path(path))}


def read(path: Path) -> list[Measured]:
    """What a file of `tune`'s says.

    Raises:
        ValueError: The file is missing, or is none that `tune` wrote.
    """
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']}, and {SCHEMA} is read")
        return [Measured(**row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{VARIABLE} names {path}, which is no table that `python -m trilby.kernels.gpu tune` wrote: {error}"
        ) from error


def write(path: Path, device: str, rows: list[Measured]) -> None:
    """Write what was measured on `device`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "device": device, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
