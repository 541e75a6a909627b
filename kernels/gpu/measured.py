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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

VARIABLE = "TRILBY_LAUNCH_TABLE"
SCHEMA = 2


class Place(NamedTuple):
    """One row of a table, for one target.

    Attributes:
        table: Name of the table.
        target: Name of the GPU's architecture.
        arithmetic: Of the row; "" where the table has none.
        size: The row's head dimension or width.
        q_len: The row's longest query; 0 where the table has none.
        scores: Of the row; "" where the table has none.
    """

    table: str
    target: str
    arithmetic: str
    size: int
    q_len: int
    scores: str


@dataclass(frozen=True)
class Measured:
    """What was found best in place of one row.

    Attributes:
        place: The row.
        numbers: Its launch parameters, by name.
        reason: What was measured.
    """

    place: Place
    numbers: Mapping[str, int]
    reason: str


_trial: ContextVar[Measured | None] = ContextVar("_trial", default=None)


@contextmanager
def trying(measured: Measured) -> Iterator[None]:
    """Launch with `measured`, whatever the file says: so candidates are measured in the very calls that users make."""
    token = _trial.set(measured)
    try:
        yield
    finally:
        _trial.reset(token)


def is_trying() -> bool:
    """Whether a candidate is tried right now."""
    return _trial.get() is not None


def file_in_force() -> str | None:
    """The file whose launch parameters hold; None: there is none."""
    return os.environ.get(VARIABLE)


def measured_numbers(place: Place) -> Mapping[str, int] | None:
    """The launch parameters measured in place of a table's row; None: the row's own hold.

    Raises:
        ValueError: The file that TRILBY_LAUNCH_TABLE names is missing, or is none that `tune` wrote.
    """
    trial = _trial.get()
    if trial is not None and trial.place == place:
        return trial.numbers
    path = file_in_force()
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
        return [Measured(Place(**row["place"]), row["numbers"], row["reason"]) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{VARIABLE} names {path}, which is no table that `python -m trilby.kernels.gpu tune` wrote: {error}"
        ) from error


def write(path: Path, device: str, rows: list[Measured]) -> None:
    """Write what was measured on `device`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"place": row.place._asdict(), "numbers": dict(row.numbers), "reason": row.reason} for row in rows]
    content = {"schema": SCHEMA, "device": device, "rows": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
