"""What a GPT is and how it is trained, as two frozen dataclasses, and the sizes that the papers publish.

The names are those of nanoGPT's checkpoints. A configuration checks itself when it is made, so one that exists is
one that works, whether it came from a program, a command line or a file of unknown origin.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from .data import Sampler

Precision = Literal["float32", "bfloat16"]

Config = TypeVar("Config", "GPTConfig", "TrainConfig")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's smallest, with 124 million parameters.

    Raises TypeError or ValueError, naming the field, for a value that no model can have.
    """

    block_size: int = 1024  # T, the longest context
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12  # H
    n_embd: int = 768  # C = H·D
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and the norms

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            _check_range(self, name, 1)
        _check_range(self, "dropout", 0, below=1)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}; it must be a multiple of n_head, {self.n_head}")


@dataclass(frozen=True)
class TrainConfig:
    """How a GPT is trained; the defaults are nanoGPT's for characters on a laptop's CPU, but for the learning rate.

    nanoGPT's falls from 1e-3 to 1e-4. From 2e-3 to 0 the same 2,000 steps learn more: 1.82 in place of 1.90, the mean
    loss of the whole validation text of tinyshakespeare.

    Raises TypeError or ValueError, naming the field, for a value that cannot be trained with.
    """

    batch_size: int = 12  # B
    accumulation_steps: int = 1  # batches whose gradients make one step
    max_steps: int = 2000
    learning_rate: float = 2e-3
    min_learning_rate: float = 0.0  # where the cosine ends, at max_steps
    warmup_steps: int = 100
    weight_decay: float = 0.1  # on matrices and embeddings; biases and norms have none
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 leaves it as it is
    eval_interval: int = 250  # steps between two validation losses; 0: none
    eval_batches: int = 20
    save_interval: int = 250  # steps between two checkpoints; the last step is always saved
    sampler: Sampler = "random"  # see `data.make_batches`
    precision: Precision = "float32"  # "bfloat16" is autocast: the weights stay float32
    compile: bool = False  # the model, by torch.compile; a checkpoint fits both
    device: str = "cpu"
    seed: int = 1337

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("batch_size", "accumulation_steps", "max_steps", "eval_batches", "save_interval"):
            _check_range(self, name, 1)
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip"):
            _check_range(self, name, 0)
        for name in ("beta1", "beta2"):
            _check_range(self, name, 0, below=1)
        for name in ("eval_interval", "seed"):
            _check_range(self, name, 0)
        _check_choice(self, "sampler", get_args(Sampler))
        _check_choice(self, "precision", get_args(Precision))


def parameter_count(config: GPTConfig) -> int:
    """How many numbers a GPT of this shape learns; the decoder shares the token embedding and counts once."""
    C = config.n_embd
    bias = int(config.bias)
    norm = C + bias * C
    attention = (3 * C * C + bias * 3 * C) + (C * C + bias * C)
    feed_forward = (4 * C * C + bias * 4 * C) + (4 * C * C + bias * C)
    embeddings = config.vocab_size * C + config.block_size * C
    return embeddings + config.n_layer * (2 * norm + attention + feed_forward) + norm


def to_dict(config: GPTConfig | TrainConfig) -> dict[str, Any]:
    """The fields by name, ready for JSON; `from_dict` reads it back."""
    return asdict(config)


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A `kind` made of `values`; an unknown name raises ValueError with the nearest known one."""
    check_names(kind.__name__, values, [field.name for field in fields(kind)])
    return kind(**values)


def check_names(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    """ValueError for the first of `names` that is not `known`, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where} has no field {name!r}; {hint}")


def _check_types(config: GPTConfig | TrainConfig) -> None:
    # The annotations are strings here; whatever is not one of these four is a Literal, and is checked as a choice.
    kinds: dict[Any, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in fields(config):
        value, kind = getattr(config, field.name), kinds.get(field.type, str)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{field.name} is {value!r}; it must be of type {field.type}")


def _check_range(config: GPTConfig | TrainConfig, name: str, least: float, below: float = float("inf")) -> None:
    value = getattr(config, name)
    if not least <= value < below:  # written so that NaN fails too
        limit = "" if below == float("inf") else f" and below {below}"
        raise ValueError(f"{name} is {value}; it must be at least {least}{limit}")


def _check_choice(config: GPTConfig | TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


# GPT-2: Radford et al. 2019, table 2, with the parameters counted as they are (the table's own counts were revised).
# GPT-3: Brown et al. 2020, table 2.1.
PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "gpt3": GPTConfig(block_size=2048, n_layer=96, n_head=96, n_embd=12288),  # 175B
    # nanoGPT's for characters on a laptop's CPU: a first model in minutes.
    "character": GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False),
}
