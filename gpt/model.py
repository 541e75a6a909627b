"""A GPT: pre-norm, of GPT-2's shape, with the parameter names of nanoGPT's checkpoints.

    tokens (B, T) ── wte + wpe ──┬─ ln_1 ─ attention ─(+)─┬─ ln_2 ─ feed-forward ─(+)─ … ── ln_f ── lm_head = wteᵀ
                                 └──────── stream ─────┘  └──────── stream ────────┘

Every residual addition is followed by a norm, so a block does not add its own branch to the stream: it hands both on,
and the next norm adds and normalizes in one pass over memory (`Layers.add_layer_norm`).

Shapes: B batch, T context, H heads, D = C/H numbers per head, C numbers per token, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from trilby import kernels

from .cache import Cache, LayerCache, Reading
from .config import GPTConfig
from .layers import TRILBY, Layers, sequence_of


class Linear(nn.Linear):
    """`input · weightᵀ + bias`, by the layers that the model is made of."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layers: Layers) -> None:
        super().__init__(in_features, out_features, bias)
        self.layers = layers

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return self.layers.linear(input, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and what came before, in H heads side by side."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias, layers)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, layers)
        self.n_head = config.n_head
        self.block_size = config.block_size
        self.dropout = config.dropout
        self.layers = layers

    def forward(self, input: Tensor, past: LayerCache | None = None, starts: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = input.shape
        heads = self.c_attn(input).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout if self.training else 0.0
        query, key, value = heads.unbind()  # (B, H, T, D) each, views of one product
        if past is not None:
            output = self.layers.cached_attention(query, *past.extend(heads[1:]))
        elif starts is not None:
            output = self.layers.packed_attention(query, key, value, starts, self.block_size, dropout_p)
        else:
            output = self.layers.attention(query, key, value, dropout_p=dropout_p, is_causal=True)
        projected: Tensor = self.c_proj(output.transpose(1, 2).reshape(B, T, C))
        return projected


class MLP(nn.Module):
    """The feed-forward layer: every position on its own, through 4·C numbers."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias, layers)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, layers)
        self.layers = layers

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # GPT-2 was trained with the tanh form of GELU.
        output: Tensor = self.c_proj(self.layers.gelu(self.c_fc(input), approximate="tanh"))
        return output


class Block(nn.Module):
    """Attention, then feed-forward; each reads the normalized stream, and its output is added by the norm after it."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__()
        self.ln_1 = AddNorm(config, layers)
        self.attn = CausalSelfAttention(config, layers)
        self.ln_2 = AddNorm(config, layers)
        self.mlp = MLP(config, layers)

    def forward(
        self, stream: Tensor, branch: Tensor | None, past: LayerCache | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream and the branch still to be added to it, (B, T, C) both; the first block is given no branch."""
        normalized, stream = self.ln_1(stream, branch)
        branch = self.attn(normalized, past, starts)
        normalized, stream = self.ln_2(stream, branch)
        return stream, self.mlp(normalized)

    def weights(self) -> kernels.BlockWeights:
        """All parameters, as `Layers.decode_blocks` takes them."""
        layers = (self.ln_1, self.attn.c_attn, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj)
        return kernels.BlockWeights(*(kernels.Affine(layer.weight, layer.bias) for layer in layers))


class AddNorm(nn.LayerNorm):
    """Add a residual branch, with dropout, to the stream, and normalize the sum."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__(config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.layers = layers

    def forward(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The normalized sum and the sum itself, which is the stream from here on, (B, T, C) both."""
        if branch is None:
            return self.layers.layer_norm(stream, self.normalized_shape, self.weight, self.bias, self.eps), stream
        dropout_p = self.dropout if self.training else 0.0
        return self.layers.add_layer_norm(
            stream, branch, self.normalized_shape, self.weight, self.bias, self.eps, dropout_p
        )


class Transformer(nn.Module):
    """Everything between the tokens and the decoder."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.layers = layers
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layers) for _ in range(config.n_layer))
        self.ln_f = AddNorm(config, layers)

    def forward(self, tokens: Tensor, past: Reading | None = None, starts: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C), normalized; `starts` as in `GPT.loss`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device) if past is None else past.places.positions
        if starts is not None:
            positions = positions - starts[sequence_of(positions, starts)]
        stream = self._embedded(tokens, positions)
        branch: Tensor | None = None
        for number, block in enumerate(self.h):
            stream, branch = block(stream, branch, None if past is None else past.layers[number], starts)
        normalized, _ = self.ln_f(stream, branch)
        output: Tensor = normalized
        return output

    def decode(self, token: Tensor, past: Reading, weights: kernels.DecoderWeights) -> Tensor:
        """(B, 1) -> (B, 1, C): what `forward` computes, in evaluation mode, with one call for all blocks."""
        assert self.layers.decode_blocks is not None
        _, stop, positions, key_lengths = past.places
        stream = self._embedded(token, positions)
        return self.layers.decode_blocks(stream, weights, past.memory, stop, key_lengths, self.ln_f.eps)

    def weights(self) -> kernels.DecoderWeights:
        """All parameters but those of embeddings, as `Layers.decode_blocks` takes them."""
        blocks = tuple(block.weights() for block in self.h if isinstance(block, Block))
        return kernels.DecoderWeights(blocks, kernels.Affine(self.ln_f.weight, self.ln_f.bias))

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.drop(self.wte(tokens) + self.wpe(positions))
        return embedded


class GPT(nn.Module):
    """A GPT that is made of `layers`: trilby's kernels, unless told otherwise.

    Made under `torch.device("meta")` it has shapes and names but no numbers, which is how GPT-3's 175 billion
    parameters fit on a laptop. Weights are drawn from PyTorch's global generator as GPT-2's were: N(0, 0.02), and the
    projections that end a residual branch narrower by the square root of their count.
    """

    def __init__(self, config: GPTConfig, layers: Layers = TRILBY) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        self.transformer = Transformer(config, layers)
        self.lm_head = Linear(config.n_embd, config.vocab_size, False, layers)
        self.tie()
        self.apply(_initialize)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @property
    def block_size(self) -> int:
        """The longest context, T."""
        return self.config.block_size

    def tie(self) -> None:
        """Make the decoder the transposed token embedding: one parameter under two names."""
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T); ValueError if T is above `block_size`.

        With a `cache`, `tokens` follow those that it has, and it has them too from then on; ValueError if they do not
        fit in.
        """
        logits: Tensor = self.lm_head(self._hidden(tokens, cache))
        return logits

    def next_logits(self, tokens: Tensor, cache: Cache | None = None, counts: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the token after the last of each row: what generating needs of `forward`, and no more.

        Args:
            tokens: (B, T).
            cache: As in `forward`.
            counts: (B), how many tokens each row has, at least 1; the rest of it is padding. None: all T.
        """
        hidden = self._hidden(tokens, cache, counts)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = hidden[:, -1] if counts is None else hidden[rows, counts - 1]
        logits: Tensor = self.lm_head(last)
        return logits

    def make_cache(self, batch_size: int, size: int | None = None) -> Cache:
        """An empty cache for `batch_size` sequences of at most `size` tokens; see `Cache`."""
        weight = self.transformer.wpe.weight
        return Cache(self.config, batch_size, size, weight.dtype, weight.device)

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, count: int | None = None) -> Tensor:
        """Mean cross entropy, in nats, of predicting `targets` (B, T) from `tokens` (B, T).

        The same as `F.cross_entropy` of the logits, which are never held all at once. ValueError as `forward`.

        Args:
            tokens: (B, T).
            targets: (B, T); -100 where there is nothing to predict.
            starts: (N + 1) int32: `tokens` is one row, (1, T), of N sequences of at most `block_size` tokens, which
                begin there and see nothing of each other; the last number is T.
            count: What the sum is divided by, instead of the number of targets: a batch may come in parts.
        """
        hidden = self._hidden(tokens) if starts is None else self._packed_hidden(tokens, starts)
        loss = self.layers.linear_cross_entropy
        return loss(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), count)

    def _packed_hidden(self, tokens: Tensor, starts: Tensor) -> Tensor:
        if tokens.ndim != 2 or len(tokens) != 1:
            raise ValueError(f"tokens is {tuple(tokens.shape)}; with starts it must be one row, (1, T)")
        hidden: Tensor = self.transformer(tokens, starts=starts)
        return hidden

    def _decoding_weights(self, tokens: Tensor, cache: Cache) -> kernels.DecoderWeights | None:
        """Those of all blocks, if one call for them all is how `tokens` are read; else None.

        They are asked for once and kept with the keys that they made: looking them up takes longer than such a call.
        """
        B, T = tokens.shape
        has_dropout = self.training and self.config.dropout > 0
        if T > 1 or has_dropout or torch.is_grad_enabled() or self.layers.decode_blocks is None:
            return None
        if cache.weights is None:
            cache.weights = self.transformer.weights()
        return None if cache.weights.reasons_for_reference(B) else cache.weights

    def _hidden(self, tokens: Tensor, cache: Cache | None = None, counts: Tensor | None = None) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.block_size:
            raise ValueError(f"tokens is {tuple(tokens.shape)}; it must be (B, T) with T at most {self.block_size}")
        if cache is None:
            hidden: Tensor = self.transformer(tokens)
            return hidden
        reading = cache.begin(tokens)
        weights = self._decoding_weights(tokens, cache)
        hidden = self.transformer.decode(tokens, reading, weights) if weights else self.transformer(tokens, reading)
        cache.finish(reading, counts)
        return hidden


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
