"""A GPT at work on a text, step by step: what becomes of it, in which shapes, who looks at whom, and what is predicted.

What is shown was computed by the model as it is: the shapes are those that went through it, and the attention is made
of what it handed to its kernel, which itself never holds the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import GPT
from .tokenizers import Tokenizer

# More tokens than these are computed, but a table of them would not fit on a terminal.
MOST_ROWS = 24
MOST_COLUMNS = 14
LONGEST_PIECE = 12


@dataclass(frozen=True)
class Walk:
    """What a model did with a text of T + 1 tokens, reading all but the last and predicting all but the first."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of what each step gave, in order, the first block's in full
    attention: Tensor  # (T, T): how much each token took from each, in one head
    logits: Tensor  # (T, V)
    losses: Tensor  # (T), in nats


@torch.no_grad()
def walk(model: GPT, tokens: Tensor, layer: int = 0, head: int = 0) -> Walk:
    """Have `model` read `tokens`, (T + 1), and watch.

    Raises:
        ValueError: there are fewer than two tokens, or more than `block_size` + 1, or no such layer or head.
    """
    config, T = model.config, len(tokens) - 1
    if not 1 <= T <= config.block_size:
        raise ValueError(f"text has {T + 1} tokens; it must have at least 2 and at most {config.block_size + 1}")
    for name, value, count in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        if not 0 <= value < count:
            raise ValueError(f"{name} is {value}; the model has 0 to {count - 1}")
    found: dict[str, Tensor] = {}
    watched = {name: module for name, module in model.named_modules() if name and not list(module.children())}
    hooks = [module.register_forward_hook(_keep(found, name)) for name, module in watched.items()]
    try:
        logits = model(tokens[None, :-1])[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    heads = found[f"transformer.h.{layer}.attn.c_attn"].view(T, 3, config.n_head, -1)[:, :, head].float()  # (T, 3, D)
    scores = heads[:, 0] @ heads[:, 1].T / math.sqrt(heads.shape[-1])
    hidden = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    return Walk(
        tuple((name, tuple(value.shape)) for name, value in found.items()),
        scores.masked_fill(hidden, -math.inf).softmax(dim=1),
        logits,
        F.cross_entropy(logits, tokens[1:], reduction="none"),
    )


def _keep(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps what a module gives; of a norm, which gives the stream too, the normalized."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    return hook


def describe(model: GPT, tokenizer: Tokenizer, tokens: Tensor, layer: int = 0, head: int = 0) -> Iterator[str]:
    """`walk`, line by line, in words and tables."""
    seen, ids = walk(model, tokens, layer, head), tokens.tolist()
    pieces = [_piece(tokenizer, token) for token in ids]
    yield from _describe_tokens(model, ids, pieces)
    yield from _describe_steps(model, seen)
    yield from _describe_attention(seen, pieces, layer, head)
    yield from _describe_predictions(seen, tokenizer, ids, pieces)


def _describe_tokens(model: GPT, ids: Sequence[int], pieces: Sequence[str]) -> Iterator[str]:
    yield f"1. Text to tokens: {len(ids)} of {model.config.vocab_size:,} kinds. From each token and those before it,"
    yield "   the next is predicted, so the text is read and expected, one token apart."
    yield ""
    yield f"   {'position':>8}  {'reads':<{LONGEST_PIECE}}  {'id':>6}  {'expects':<{LONGEST_PIECE}}  {'id':>6}"
    for position in range(min(len(ids) - 1, MOST_ROWS)):
        read, expected = (f"{pieces[p]:<{LONGEST_PIECE}}  {ids[p]:>6}" for p in (position, position + 1))
        yield f"   {position:>8}  {read}  {expected}"
    yield from _left_out(len(ids) - 1, MOST_ROWS)
    yield ""


def _describe_steps(model: GPT, seen: Walk) -> Iterator[str]:
    config = model.config
    B, T, C = 1, len(seen.losses), config.n_embd
    H, D = config.n_head, C // config.n_head
    yield f"2. Through the model: B = {B} text, T = {T} tokens, C = {C} numbers for each, H = {H} heads of D = {D}."
    yield ""
    meanings = {
        "transformer.wte": "a row of the token embedding for each token",
        "transformer.wpe": "and one for its position, added",
        "ln_1": "normalized",
        "attn.c_attn": f"query, key and value: three times ({B}, {H}, {T}, {D})",
        "attn.c_proj": f"softmax(query · keyᵀ / √{D}) · value of all heads, mixed; added",
        "ln_2": "normalized again",
        "mlp.c_fc": "each token on its own, made wider, through GELU",
        "mlp.c_proj": "and narrow again; added",
        "transformer.ln_f": "normalized a last time",
        "lm_head": "a logit for every token that could follow: products with all embeddings",
    }
    for name, shape in seen.shapes:
        block, _, step = name.removeprefix("transformer.h.").partition(".")
        inside = name.startswith("transformer.h.")
        if (meaning := meanings.get(step if inside else name)) is not None and (not inside or block == "0"):
            yield f"   {name.removeprefix('transformer.'):<18} {_shape(shape):<16} {meaning}"
        if inside and (block, step) == (str(config.n_layer - 1), "mlp.c_proj") and config.n_layer > 1:
            yield f"   {'h.1 …':<18} {'':<16} the same in every block, of {config.n_layer}"
    yield ""


def _describe_attention(seen: Walk, pieces: Sequence[str], layer: int, head: int) -> Iterator[str]:
    T = min(len(seen.attention), MOST_COLUMNS)
    yield f"3. Who looks at whom, in percent: block {layer}, head {head}. A token sees itself and those before it."
    yield ""
    yield f"   {'':<{LONGEST_PIECE}} " + " ".join(f"{piece[:4]:>4}" for piece in pieces[:T])
    for row in range(T):
        shares = " ".join(f"{100 * share:4.0f}" for share in seen.attention[row, : row + 1].tolist())
        yield f"   {pieces[row]:<{LONGEST_PIECE}} {shares}"
    yield from _left_out(len(seen.attention), MOST_COLUMNS)
    yield ""


def _describe_predictions(seen: Walk, tokenizer: Tokenizer, ids: Sequence[int], pieces: Sequence[str]) -> Iterator[str]:
    chances, likeliest = seen.logits.softmax(dim=1).max(dim=1)
    yield "4. What it expects, what comes, and what the surprise costs: -ln(probability) nats."
    yield ""
    yield f"   {'after':<{LONGEST_PIECE}}  {'expects':<{LONGEST_PIECE}}       {'comes':<{LONGEST_PIECE}}         loss"
    for position, loss in enumerate(seen.losses.tolist()[:MOST_ROWS]):
        expected = f"{_piece(tokenizer, int(likeliest[position])):<{LONGEST_PIECE}} {chances[position]:4.0%}"
        came = f"{pieces[position + 1]:<{LONGEST_PIECE}} {math.exp(-loss):6.1%}"
        yield f"   {pieces[position]:<{LONGEST_PIECE}}  {expected}  {came}  {loss:6.3f}"
    yield from _left_out(len(seen.losses), MOST_ROWS)
    guessing = math.log(seen.logits.shape[1])
    mean = seen.losses.mean().item()
    yield ""
    yield f"   The loss is their mean, {mean:.4f}: as if it chose among {math.exp(mean):,.1f} tokens. To know nothing"
    yield f"   costs ln({seen.logits.shape[1]:,}) = {guessing:.4f}."


def _left_out(count: int, shown: int) -> Iterator[str]:
    if count > shown:
        yield f"   … and {count - shown} more"


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """A token as it can be shown: blanks and line ends visible, a part of a character as its bytes."""
    if token == tokenizer.start:
        return "<|start|>"
    try:
        shown = tokenizer.decode_bytes([token])
    except ValueError:
        return "?"
    text = shown.decode("utf-8", "backslashreplace").replace(" ", "·")
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text if len(text) <= LONGEST_PIECE else text[: LONGEST_PIECE - 1] + "…"


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
