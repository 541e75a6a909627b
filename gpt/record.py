"""What a training leaves to look at: its losses as a table and a picture, and what the model writes meanwhile."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TextIO

import torch

from .generate import stream_text
from .plot import Curve, draw_losses, smoothed
from .tokenizers import Tokenizer
from .train import Step, Training

COLUMNS = ("step", "loss", "learning_rate", "tokens", "seconds", "validation_loss")
SAMPLE_SEED = 1337


class LossTable:
    """`losses.csv`, a row for every step, written as the steps are made.

    A run that goes on from a checkpoint keeps the rows up to it; those of steps that will be made again are dropped.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self.rows = [row for row in _read(path) if int(row["step"]) <= steps_done]
        kept = path.with_name(f".{path.name}.unfinished")
        with kept.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(kept, path)
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def add(self, step: Step) -> None:
        """Write the row of `step`."""
        validation = "" if step.validation_loss is None else step.validation_loss
        values = (step.number, step.loss, step.learning_rate, step.tokens, step.seconds, validation)
        self.rows.append(dict(zip(COLUMNS, map(str, values))))
        self._writer.writerow(self.rows[-1])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def draw(self, path: Path) -> None:
        """Write the curves of all steps so far to `path`; ImportError if matplotlib is not installed."""
        trained = Curve("training", *self._points("loss"))
        validated = Curve("validation", *self._points("validation_loss"), dashed=True)
        draw_losses(path, [smoothed(trained), *([validated] if validated.x else [])])

    def _points(self, column: str) -> tuple[list[float], list[float]]:
        rows = [row for row in self.rows if row[column]]
        return [float(row["step"]) for row in rows], [float(row[column]) for row in rows]


def write_sample(path: Path, training: Training, tokenizer: Tokenizer, length: int) -> None:
    """Append to the file at `path` what the model writes now: `length` tokens, of the same random numbers every time.

    It begins as documents do or, where the vocabulary has no `<|endoftext|>`, with the first token of the text.
    """
    model = training.model
    device = next(model.parameters()).device
    start = training.tokens.train[torch.zeros(1, 1, dtype=torch.int64)]
    if tokenizer.start is not None:
        start.fill_(tokenizer.start)
    generator = torch.Generator(device).manual_seed(SAMPLE_SEED)
    model.eval()
    text = "".join(stream_text(model, tokenizer, start.to(device), length, generator=generator))
    with path.open("a", encoding="utf-8") as file:
        file.write(f"--- after step {training.steps_done}\n{text}\n")


def _read(path: Path) -> list[dict[str, str]]:
    """The whole rows of the table at `path`; a kill may have cut the last one short."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]
