"""Checkpoints: one safetensors file with everything that the next training step depends on.

The file holds numbers and JSON, never code. It is written beside the old one and then takes its place, so whoever is
killed at any moment leaves a whole checkpoint behind. When one is opened, every name, shape and dtype in it is compared
with what its own configuration asks for, before anything is allocated, and every tensor that is read with its checksum:
a corrupt or hostile file is an error and nothing else.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import GPTConfig, TrainConfig, from_dict, parameter_count, to_dict
from .data import Split, fingerprint
from .layers import TRILBY, Layers
from .model import GPT
from .tensor_file import reading, write
from .tokenizers import Tokenizer, tokenizer_from_dict
from .train import Training, check_device, make_optimizer, prefetched_batches

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW remembers of each parameter
DTYPES = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not a whole one, or does not fit what it is used for."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself; the numbers stay in the file until they are asked for."""

    path: Path
    model: GPTConfig
    train: TrainConfig
    tokenizer: dict[str, Any]
    text: str  # SHA-256 of the ids that were trained on
    steps_done: int
    checksums: dict[str, int]  # CRC-32 of every tensor

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check the header of the file at `path`.

        Raises:
            OSError: the file cannot be read.
            CheckpointError: it is no checkpoint; the message says what is wrong with it.
            ImportError: safetensors is not installed.
        """
        path = Path(path)
        with reading(path, CheckpointError) as file:
            checkpoint = cls(path=path, **_header(path, file.metadata()))
            _check_tensors(file, checkpoint)
        return checkpoint

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with; see `tokenizer.TiktokenTokenizer` for what it may raise."""
        return tokenizer_from_dict(self.tokenizer)

    def make_model(self, layers: Layers = TRILBY, device: str = "cpu") -> GPT:
        """The model, with its weights, ready to generate."""
        with reading(self.path, CheckpointError) as file:
            return self._load_model(file, layers).to(check_device(device)).eval()

    def resume(self, tokens: Split, layers: Layers = TRILBY) -> Training:
        """The training where it was left; on a CPU it goes on bit for bit as if it had never stopped.

        Raises:
            CheckpointError: `tokens` are not those that the training began with.
        """
        if fingerprint(tokens) != self.text:
            raise CheckpointError(f"{self.path} was trained on another text than the one it is to go on with")
        config, device = self.train, check_device(self.train.device)
        batches = prefetched_batches(tokens, config, self.model)
        with reading(self.path, CheckpointError) as file:
            model = self._load_model(file, layers).to(device)
            optimizer = make_optimizer(model, config)
            if self.steps_done:
                for name, parameter in model.named_parameters():
                    moments = {moment: self._load(file, f"optimizer.{moment}.{name}") for moment in MOMENTS}
                    optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}
            dropout, position = self._load(file, "dropout"), self._load(file, "batches")
            try:
                batches.restore(position)
                torch.Generator(device).set_state(dropout)
            except (RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.path} has a broken generator or data position: {error}") from None
        return Training(model, config, tokens, optimizer, batches, dropout, self.steps_done)

    def _load_model(self, file: Any, layers: Layers) -> GPT:
        with torch.device("meta"):
            model = GPT(self.model, layers)
        model = model.to_empty(device="cpu")
        model.tie()  # to_empty gives each name a tensor of its own
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._load(file, f"model.{name}"))
        return model

    def _load(self, file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if _checksum(tensor) != self.checksums.get(name):
            raise CheckpointError(f"{self.path} is damaged: the numbers of {name} are not those that were written")
        return tensor


def save_checkpoint(path: str | Path, training: Training, tokenizer: Tokenizer) -> None:
    """Write `training` to the file at `path`, which is at every moment the old checkpoint or the new one."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in training.model.named_parameters()}
    if training.steps_done:
        for name, parameter in training.model.named_parameters():
            for moment in MOMENTS:
                tensors[f"optimizer.{moment}.{name}"] = training.optimizer.state[parameter][moment]
    tensors["dropout"] = training.dropout_state
    tensors["batches"] = training.batches.state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model": to_dict(training.model.config),
        "train": to_dict(training.config),
        "tokenizer": tokenizer.to_dict(),
        "text": fingerprint(training.tokens),
        "steps_done": training.steps_done,
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    write(Path(path), tensors, {"trilby": json.dumps(header)})


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy().data)


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """The fields of a `Checkpoint` but for its path, checked as far as they can be without the tensors."""
    try:
        header = json.loads((metadata or {})["trilby"])
        if header.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if not isinstance(header["steps_done"], int) or header["steps_done"] < 0:
            raise ValueError(f"steps_done is {header['steps_done']!r}")
        return {
            "model": from_dict(GPTConfig, header["model"]),
            "train": from_dict(TrainConfig, header["train"]),
            "tokenizer": dict(header["tokenizer"]),
            "text": str(header["text"]),
            "steps_done": header["steps_done"],
            "checksums": dict(header["checksums"]),
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of trilby: {type(error).__name__}: {error}") from None


def _check_tensors(file: Any, checkpoint: Checkpoint) -> None:
    """Compare the names, shapes and dtypes in the file with those that its own configuration asks for."""
    names = set(file.keys())
    slices = {name: file.get_slice(name) for name in names}
    # Even shapes cost memory, so a model that the file cannot hold is refused before its shapes are worked out.
    numbers = sum(_numel(slices[name].get_shape()) for name in names if name.startswith("model."))
    config = checkpoint.model
    if config.n_layer > len(names) or parameter_count(config) != numbers:
        raise CheckpointError(f"{checkpoint.path} has {numbers} parameters, which is not the model that it describes")
    expected = dict(_expected(checkpoint))
    if names != expected.keys():
        odd = sorted(names.symmetric_difference(expected))[:3]
        raise CheckpointError(f"{checkpoint.path} has tensors missing or too many: {', '.join(odd)}, …")
    for name, (shape, dtype) in expected.items():
        found = slices[name].get_shape(), DTYPES.get(slices[name].get_dtype())
        if found[1] != dtype or (shape is not None and found[0] != shape):
            raise CheckpointError(f"{checkpoint.path}: {name} is {found}; it must be {(shape, dtype)}")


def _expected(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[list[int] | None, torch.dtype]]]:
    """Name, shape (None: any) and dtype of every tensor in a checkpoint."""
    with torch.device("meta"):
        parameters = dict(GPT(checkpoint.model).named_parameters())
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        yield f"model.{name}", (shape, torch.float32)
        if checkpoint.steps_done:
            for moment in MOMENTS:
                yield f"optimizer.{moment}.{name}", ([] if moment == "step" else shape, torch.float32)
    yield "dropout", (None, torch.uint8)
    yield "batches", (None, torch.uint8 if checkpoint.train.sampler == "random" else torch.int64)


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()
