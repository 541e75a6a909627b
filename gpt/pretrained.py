"""Published weights: GPT-2 as Hugging Face's transformers keeps it, read from a folder of one's own, and written back.

The parameters have the same names there as here. The matrices of the blocks are transposed, (in, out), since GPT-2's
own code multiplied from the other side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import PRESETS, GPTConfig, parameter_count
from .layers import TRILBY, Layers
from .model import GPT
from .tensor_file import reading, write
from .tokenizers import TiktokenTokenizer
from .train import check_device

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
VOCABULARY = 50257
SIZES = {  # config.json's names of what decides the shapes
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# What else config.json can say that changes the numbers, and the answers that this GPT gives; the first is the default.
MEANINGS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
NOT_LEARNED = (".attn.bias", ".attn.masked_bias")  # causal masks, which older files have among the weights
DTYPES = ("F32", "F16", "BF16")


class PretrainedError(ValueError):
    """A folder or file that holds no GPT-2, or a damaged one, or one that means something else."""


def load_pretrained(path: str | Path, layers: Layers = TRILBY, device: str = "cpu", dropout: float = 0.0) -> GPT:
    """The GPT-2 at `path`, in float32, ready to generate.

    Args:
        path: A folder with config.json and model.safetensors (or several files and their index), as
            `GPT2LMHeadModel.save_pretrained` writes it, or the safetensors file alone if it is of a published size.
        layers: What it is made of.
        device: Where it computes.
        dropout: What to train it on with; the files have several rates, and this GPT one.

    Raises:
        OSError: a file cannot be read.
        PretrainedError: it is no GPT-2; the message says what is wrong with it.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    with ExitStack() as files:
        tensors = _open(path, files)
        config = _config(path, tensors, dropout)
        _check_tensors(path, tensors, config)
        with torch.device("meta"):
            model = GPT(config, layers)
        model = model.to_empty(device="cpu")
        model.tie()  # to_empty gives each name a tensor of its own
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = tensors[name].load()
                parameter.copy_(tensor.T if name.endswith(TRANSPOSED) else tensor)
    return model.to(check_device(device)).eval()


def save_pretrained(path: str | Path, model: GPT) -> None:
    """Write `model` into the folder `path` as `GPT2LMHeadModel.from_pretrained` reads it; absent biases become zeros.

    Raises:
        OSError: a file cannot be written.
        ImportError: safetensors is not installed.
    """
    path, config = Path(path), model.config
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, shape in _published_shapes(config):
        if (parameter := parameters.get(name)) is None:
            tensors[name] = torch.zeros(shape)
        else:
            stored = parameter.detach().cpu()
            tensors[name] = (stored.T if name.endswith(TRANSPOSED) else stored).contiguous()
    path.mkdir(parents=True, exist_ok=True)
    write(path / WEIGHTS, tensors, {"format": "pt"})
    values = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    values |= {name: allowed[0] for name, allowed in MEANINGS.items()}
    values |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    values |= {"architectures": ["GPT2LMHeadModel"], "dtype": str(model.transformer.wte.weight.dtype).split(".")[1]}
    (path / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def pretrained_tokenizer(config: GPTConfig) -> TiktokenTokenizer:
    """GPT-2's own tokenizer, which every published GPT-2 was trained with.

    Raises:
        PretrainedError: the model has another vocabulary.
        ImportError, FileNotFoundError: see `TiktokenTokenizer`.
    """
    if config.vocab_size != VOCABULARY:
        raise PretrainedError(f"the model has {config.vocab_size} tokens; of GPT-2's vocabulary there are {VOCABULARY}")
    return TiktokenTokenizer("gpt2")


class _Stored(NamedTuple):
    """A tensor that is still in its file."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        shape: list[int] = self.file.get_slice(self.name).get_shape()
        return shape

    @property
    def dtype(self) -> str:
        dtype: str = self.file.get_slice(self.name).get_dtype()
        return dtype

    def load(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def _open(path: Path, files: ExitStack) -> dict[str, _Stored]:
    """Every learned tensor at `path`, by this GPT's name for it; the files stay open as long as `files`."""
    tensors = {}
    for part in _parts(path):
        file = files.enter_context(reading(part, PretrainedError))
        names: list[str] = file.keys()
        for name in names:
            if not name.endswith(NOT_LEARNED):
                known = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                tensors[known] = _Stored(file, name)
    if (decoder := tensors.pop("lm_head.weight", None)) is not None:  # some files have the tied weight twice
        embedding = tensors.get("transformer.wte.weight")
        if embedding is None or not torch.equal(decoder.load(), embedding.load()):
            raise PretrainedError(f"{path} has a decoder of its own; in a GPT-2 it is the token embedding, transposed")
    return tensors


def _parts(path: Path) -> list[Path]:
    """The safetensors files of what is at `path`."""
    if not path.is_dir():
        return [path]
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if (path / INDEX).exists():
        try:
            names = set(_read_json(path / INDEX)["weight_map"].values())
            inside = all(Path(name).name == name for name in names)
        except (KeyError, AttributeError, TypeError):
            inside = False
        if not inside:
            raise PretrainedError(f"{path / INDEX} is no index of files beside it")
        return [path / name for name in sorted(names)]
    if (path / PICKLE).exists():
        raise PretrainedError(
            f"{path} has its weights as a pickle, {PICKLE}, which runs code when it is read. Where you trust it, write "
            f"it anew as {WEIGHTS}: GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder)"
        )
    raise PretrainedError(f"{path} has no {WEIGHTS}")


def _config(path: Path, tensors: Mapping[str, _Stored], dropout: float) -> GPTConfig:
    """What config.json says, or for a file without one, which published size the shapes are of."""
    described = (path if path.is_dir() else path.parent) / CONFIG
    if not described.exists():
        if path.is_dir():
            raise PretrainedError(f"{path} has no {CONFIG}")
        return _published_config(path, tensors, dropout)
    values = _read_json(described)
    for name, allowed in MEANINGS.items():
        if values.get(name, allowed[0]) not in allowed:
            raise PretrainedError(f"{described}: {name} is {values[name]!r}; this GPT has {allowed[0]!r}")
    try:
        sizes = {ours: values[theirs] for theirs, ours in SIZES.items()}
        config = GPTConfig(**sizes, dropout=dropout)
    except KeyError as missing:
        raise PretrainedError(f"{described} does not say {missing}") from None
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{described}: {error}") from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise PretrainedError(f"{described}: n_inner is {values['n_inner']}; this GPT has {4 * config.n_embd}")
    return config


def _published_config(path: Path, tensors: Mapping[str, _Stored], dropout: float) -> GPTConfig:
    """The shapes tell everything but how many heads there are."""
    names = [name for name, config in PRESETS.items() if name.startswith("gpt2")]
    for name in names:
        config = replace(PRESETS[name], dropout=dropout)
        if set(tensors) == {name for name, _ in _published_shapes(config)}:
            return config
    raise PretrainedError(f"{path} has no {CONFIG} beside it and is not one of {', '.join(names)}, of known shapes")


def _check_tensors(path: Path, tensors: Mapping[str, _Stored], config: GPTConfig) -> None:
    """Compare the names, shapes and dtypes in the files with those of `config`, before anything is allocated."""
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    # Even shapes cost memory, so a model that the files cannot hold is refused before its shapes are worked out.
    if config.n_layer > len(tensors) or parameter_count(config) != numbers:
        raise PretrainedError(f"{path} has {numbers} parameters, which is not the model that {CONFIG} describes")
    expected = dict(_published_shapes(config))
    if odd := sorted(tensors.keys() ^ expected.keys())[:3]:
        raise PretrainedError(f"{path} has tensors missing or too many: {', '.join(odd)}, …")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in DTYPES:
            found = f"{tensor.shape} {tensor.dtype}"
            raise PretrainedError(f"{path}: {name} is {found}; it must be {shape} and {' or '.join(DTYPES)}")


def _published_shapes(config: GPTConfig) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor in a file of such a GPT-2."""
    with torch.device("meta"):
        parameters = dict(GPT(replace(config, bias=True)).named_parameters())
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        yield name, shape[::-1] if name.endswith(TRANSPOSED) else shape


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PretrainedError(f"{path} is not a JSON object")
    return values
