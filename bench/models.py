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

from .cases import attention_flops


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and of its batches."""

    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    length: int
    vocab_size: int

    @property
    def shape(self) -> str:
        """As the table shows them."""
        return f"{self.n_layer} layers {self.n_head}x{self.n_embd // self.n_head} B={self.batch_size} T={self.length}"


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
    make: Callable[[Sizes], nn.Module]
    is_causal: bool = True
    has_dropout: bool = False

    def flops(self, sizes: Sizes, model: nn.Module, direction: Literal["step", "forward"]) -> float:
        """Floating-point operations: 2 for each parameter that multiplies and token, three times that in a step.

        The position embedding multiplies nothing; the token embedding does, as the decoder.
        """
        parameters = sum(p.numel() for p in model.parameters()) - sizes.length * sizes.n_embd
        of_matrices = 2 * parameters * sizes.batch_size * sizes.length * (3 if direction == "step" else 1)
        of_attention = attention_flops(
            sizes.batch_size,
            sizes.n_head,
            sizes.length,
            sizes.n_embd // sizes.n_head,
            "forward+backward" if direction == "step" else direction,
        )
        return of_matrices + sizes.n_layer * of_attention * (1 if self.is_causal else 2)


class _Block(nn.Module):
    """A block of a GPT: attention of one projection, and a perceptron, each after its norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        C = sizes.n_embd
        self.n_head = sizes.n_head
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

    def __init__(self, sizes: Sizes, layers: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.n_embd)
        self.positions = nn.Embedding(sizes.length, sizes.n_embd)
        self.layers, self.norm = layers, nn.LayerNorm(sizes.n_embd)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


def _gpt(sizes: Sizes) -> nn.Module:
    return _Layered(sizes, nn.Sequential(*(_Block(sizes) for _ in range(sizes.n_layer))))


def _encoder(sizes: Sizes) -> nn.Module:
    layer = nn.TransformerEncoderLayer(sizes.n_embd, sizes.n_head, 4 * sizes.n_embd, dropout=0.0, batch_first=True)
    return _Layered(sizes, nn.TransformerEncoder(layer, sizes.n_layer, enable_nested_tensor=False))


class _HuggingFace(nn.Module):
    """transformers' GPT-2, of random weights."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        with our_folders_hidden():
            transformers = importlib.import_module("transformers")
            config = transformers.GPT2Config(
                vocab_size=sizes.vocab_size,
                n_positions=sizes.length,
                n_embd=sizes.n_embd,
                n_layer=sizes.n_layer,
                n_head=sizes.n_head,
                attn_pdrop=dropout,
                embd_pdrop=dropout,
                resid_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
            self.model: Any = transformers.GPT2LMHeadModel(config)

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
HUGGING_FACE = (Model("GPT-2, Hugging Face", lambda sizes: _HuggingFace(sizes, 0.0)),)


def has_transformers() -> bool:
    """Whether transformers is installed."""
    with our_folders_hidden():
        return importlib.util.find_spec("transformers") is not None


def hugging_face(sizes: Sizes, dropout: float) -> nn.Module:
    """Transformers' GPT-2, of random weights: tokens [B, T] in, logits [B, T, vocab_size] out."""
    return _HuggingFace(sizes, dropout)


def models() -> tuple[Model, ...]:
    """Those that can be built here: Hugging Face's if transformers is installed."""
    return MODELS + HUGGING_FACE * has_transformers()
