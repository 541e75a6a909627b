"""A run: a folder with everything about one training.

config.toml             what was asked for
tokens/                 the text, tokenized once
checkpoint.safetensors  the training, to go on with; and the model, to write with
losses.csv, losses.svg  a row for every step; the curves
samples.txt             what the model wrote at every checkpoint
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, save_checkpoint
from .data import TokenFile, default_text, texts_of, write_token_file
from .record import LossTable, write_sample
from .settings import Settings, make_settings, to_toml
from .tokenizers import Tokenizer, make_tokenizer
from .train import Step, Training

CHANGEABLE = {"max_steps", "compile"}  # what may be another than the checkpoint says when a training goes on

Counter = Callable[[int, int], None]  # is told how many bytes of how many are tokenized


@dataclass(frozen=True)
class Run:
    """The run in `folder`."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The file that `Checkpoint.open` reads."""
        return self.folder / "checkpoint.safetensors"

    def start(self, settings: Settings, on_bytes: Counter) -> tuple[Tokenizer, Training]:
        """A new training.

        Raises:
            ValueError: there is a training in the folder already; or see `write_token_file` and `Training.start`.
            OSError, ImportError: see `write_token_file` and `make_tokenizer`.
        """
        if self.checkpoint.exists():
            raise ValueError(f"{self.folder} has a checkpoint; --resume goes on with it, --run names another folder")
        texts = settings.data.text or (self._default_text(),)
        settings = replace(settings, data=replace(settings.data, text=tuple(str(Path(p).absolute()) for p in texts)))
        tokenizer = make_tokenizer(settings.data.tokenizer, texts_of(texts), settings.data.vocab_size)
        model = settings.make_model(tokenizer.vocab_size)
        tokens = self._tokens(settings, tokenizer, on_bytes)
        training = Training.start(model, settings.train, tokens.split())
        (self.folder / "config.toml").write_text(to_toml(settings), encoding="utf-8")
        return tokenizer, training

    def resume(self, changes: dict[str, Any], on_bytes: Counter) -> tuple[Tokenizer, Training]:
        """The training where its last checkpoint left it; `changes` may be of max_steps and compile.

        Raises:
            OSError: there is no checkpoint, or it or the text cannot be read.
            ValueError: another change is asked for; or see `Checkpoint.open` and `Checkpoint.resume`.
        """
        if others := sorted(changes.keys() - CHANGEABLE):
            may = " and ".join(sorted(CHANGEABLE))
            raise ValueError(f"--resume goes on as the checkpoint says; {', '.join(others)} cannot change, only {may}")
        checkpoint = Checkpoint.open(self.checkpoint)
        checkpoint = replace(checkpoint, train=replace(checkpoint.train, **changes))
        tokenizer = checkpoint.make_tokenizer()
        tokens = self._tokens(make_settings(self.folder / "config.toml", {}), tokenizer, on_bytes)
        return tokenizer, checkpoint.resume(tokens.split())

    @contextmanager
    def recording(
        self, training: Training, tokenizer: Tokenizer, sample_tokens: int
    ) -> Iterator[tuple[Callable[[Step], None], Callable[[Training], None]]]:
        """What `Training.run` is to call at every step, and to save: it keeps everything in the folder up to date."""
        table = LossTable(self.folder / "losses.csv", training.steps_done)
        draws = True

        def save(training: Training) -> None:
            nonlocal draws
            save_checkpoint(self.checkpoint, training, tokenizer)
            if sample_tokens:
                write_sample(self.folder / "samples.txt", training, tokenizer, sample_tokens)
            try:
                if draws:
                    table.draw(self.folder / "losses.svg")
            except ImportError as missing:
                draws = False
                print(f"trilby.gpt: {missing}", file=sys.stderr)

        try:
            yield table.add, save
        finally:
            table.close()

    def _tokens(self, settings: Settings, tokenizer: Tokenizer, on_bytes: Counter) -> TokenFile:
        return write_token_file(self.folder / "tokens", settings.data.text, tokenizer, on_bytes)

    def _default_text(self) -> str:
        """The file of the default text, which is written here if it comes from no file."""
        text = default_text()
        if Path(text.source).is_file():
            return text.source
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "text.txt"
        if not file.is_file() or file.read_text(encoding="utf-8") != text.content:
            file.write_text(text.content, encoding="utf-8")
        return str(file)
