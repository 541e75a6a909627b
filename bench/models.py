"""Models as people write them, that know nothing of trilby: what `activate()` is measured with."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import trilby.kernels
from torch import Tensor, nn
from trilby.gpt import GPTConfig

from .cases import attention_flops


@dataclass(frozen=True)
class Model:
    """A model to be run unchanged.

    Attributes:
        name: What the table calls it.
        make: Builds it: tokens [B, T] in, logits [B, T, vocab_size] out.
        is_causal: Whether a token sees only those before it; then it learns to tell the next, otherwise its own.
        has_dropout: Whether a step draws random numbers; then no two of its loss curves are the same.
    """

    name: str
    make: Callable[[GPTConfig], nn.Module]
    is_causal: bool = True
    has_dropout: bool = False

    def flops(
        self, config: GPTConfig, batch_size: int, model: nn.Module, direction: Literal["step", "forward"]
    ) -> float:
        """Floating-point operations of a batch of whole contexts: 2 for each parameter that multiplies and token.

        In a step there are three times as many. The position embedding multiplies nothing; the token embedding does, as
        the decoder.
        """
        T = config.block_size
        parameters = sum(p.numel() for p in model.parameters()) - T * config.n_embd
        of_matrices = 2 * parameters * batch_size * T * (3 if direction == "step" else 1)
        of_attention = attention_flops(
            batch_size,
            config.n_head,
            T,
            config.n_embd // config.n_head,
            "forward+backward" if direction == "step" else direction,
        )
        return of_matrices + config.n_layer * of_attention * (1 if self.is_causal else 2)


class _Block(nn.Module):
    """A block of a GPT: attention of one projection, and a perceptron, each after its norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.qkv, self.project = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.expand, self.contract = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.qkv(self.norms[0](x)).view(B, T, 3 * self.n_head, -1).transpose(1, 2)
        query, key, value = heads.split(self.n_head, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(B, T, C))
        expanded: Tensor = self.expand(self.norms[1](x))
        return x + cast(Tensor, self.contract(F.gelu(expanded)))


class _Layered(nn.Module):
    """Embeddings of tokens and positions, `layers`, and a decoder that shares the tokens' weights."""

    def __init__(self, config: GPTConfig, layers: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.layers, self.norm = layers, nn.LayerNorm(config.n_embd)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


def _gpt(config: GPTConfig) -> nn.Module:
    return _Layered(config, nn.Sequential(*(_Block(config) for _ in range(config.n_layer))))


def _encoder(config: GPTConfig) -> nn.Module:
    layer = nn.TransformerEncoderLayer(config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.0, batch_first=True)
    return _Layered(config, nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False))


class _HuggingFace(nn.Module):
    """transformers' GPT-2, of random weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        with our_folders_hidden():
            transformers = importlib.import_module("transformers")
            of_theirs = transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                attn_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
            self.model: Any = transformers.GPT2LMHeadModel(of_theirs)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


@contextmanager
def our_folders_hidden() -> Iterator[None]:
    """In a checkout transformers would take our folder kernels/ for Hugging Face's package of that name."""
    ours = Path(trilby.kernels.__file__).resolve().parent
    before = list(sys.path)
    sys.path[:] = [path for path in before if (Path(path) / "kernels").resolve() != ours]
    try:
        yield
    finally:
        sys.path[:] = before


MODELS = (
    Model("GPT, plain PyTorch", _gpt),
    Model("nn.TransformerEncoder", _encoder, is_causal=False),
)
HUGGING_FACE = (Model("GPT-2, Hugging Face", _HuggingFace),)


def has_transformers() -> bool:
    """Whether transformers is installed."""
    with our_folders_hidden():
        return importlib.util.find_spec("transformers") is not None


def hugging_face(config: GPTConfig) -> nn.Module:
    """Transformers' GPT-2, of random weights: tokens [B, T] in, logits [B, T, vocab_size] out."""
    return _HuggingFace(config)


def models() -> tuple[Model, ...]:
    """Those that can be built here: Hugging Face's if transformers is installed."""
    return MODELS + HUGGING_FACE * has_transformers()
