"""What a training is asked for: a TOML file, and flags that come before it.

    preset = "gpt2"

    [data]
    text = ["a.txt", "b.txt"]
    tokenizer = "byte-pair"
    vocab_size = 4096

    [model]
    n_layer = 6

    [train]
    max_steps = 5000

Every name is one of a configuration's, or an error that says which one is nearest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .config import PRESETS, GPTConfig, TrainConfig, check_names, from_dict

TABLES = ("data", "model", "train")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. Raises TypeError, naming the field, for a value of another type."""

    text: tuple[str, ...] = ()  # files, a document each; none: `data.default_text`
    tokenizer: str = "characters"  # see `tokenizers.make_tokenizer`
    vocab_size: int | None = None  # how many tokens "byte-pair" learns

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", tuple(self.text) if isinstance(self.text, list) else self.text)
        if not isinstance(self.text, tuple) or not all(isinstance(path, str) for path in self.text):
            raise TypeError(f"text is {self.text!r}; it must be a list of file names")
        if not isinstance(self.tokenizer, str):
            raise TypeError(f"tokenizer is {self.tokenizer!r}; it must be a name")
        if self.vocab_size is not None and type(self.vocab_size) is not int:
            raise TypeError(f"vocab_size is {self.vocab_size!r}; it must be an integer")


@dataclass(frozen=True)
class Settings:
    """What a training is asked for; the model's vocabulary is the tokenizer's to say."""

    data: DataConfig = field(default_factory=DataConfig)
    preset: str = "character"
    model: Mapping[str, Any] = field(default_factory=dict)  # where it differs from the preset
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; allowed are {', '.join(PRESETS)}")
        if "vocab_size" in self.model:
            raise ValueError("model has a vocab_size; it is the tokenizer's to say, and goes into data for 'byte-pair'")
        check_names("model", self.model, [field.name for field in fields(GPTConfig)])
        self.make_model(1)

    def make_model(self, vocab_size: int) -> GPTConfig:
        """The model's configuration, given the size of the tokenizer's vocabulary."""
        return replace(PRESETS[self.preset], vocab_size=vocab_size, **self.model)


def make_settings(file: Path | None, flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings in the TOML file, if there is one, and over them those of the `flags`: "preset", and the tables.

    Raises:
        OSError: the file cannot be read.
        ValueError, TypeError: it is not TOML, or has a name that there is not, or a value that cannot be.
        ImportError: Python is older than 3.11 and tomli is not installed.
    """
    values = {} if file is None else _read_toml(file)
    check_names(str(file), values, ["preset", *TABLES])
    for name in TABLES:
        if not isinstance(values.setdefault(name, {}), dict):
            raise TypeError(f"{name} is {values[name]!r}; it must be a table, [{name}]")
        values[name] |= flags.get(name, {})
    values |= flags.get("", {})
    check_names("data", values["data"], [field.name for field in fields(DataConfig)])
    data, train = DataConfig(**values["data"]), from_dict(TrainConfig, values["train"])
    return Settings(data, values.get("preset", Settings.preset), values["model"], train)


def to_toml(settings: Settings) -> str:
    """`settings`, every field of them, as `make_settings` reads them."""
    data = {name: value for name, value in asdict(settings.data).items() if value is not None}
    tables = {"data": data, "model": settings.model, "train": asdict(settings.train)}
    lines = [f"preset = {json.dumps(settings.preset)}"]
    for name, table in tables.items():
        # The values are numbers, texts, truths and lists of texts, which TOML writes as JSON does.
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _read_toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("a TOML file needs Python 3.11 or tomli: pip install 'trilby[gpt]'") from None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
