"""Generates from one GPT with trilby and with what a user would otherwise take, in turns, and compares the logits.

The other is Hugging Face's transformers on the same weights, where it is installed, and else the reference GPT with its
cache on PyTorch's own layers. The truth is the reference GPT in float64, with the weights rounded as ours are.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trilby.gpt import (
    GPT,
    GREEDY,
    PYTORCH,
    TRILBY,
    GPTConfig,
    generate,
    hold,
    load_pretrained,
    parameter_count,
    save_pretrained,
)
from trilby.gpt.weights import Weights, dense

from .contestants import largest_difference
from .machine import Ceilings
from .measure import Budget, interleaved
from .models import our_folders_hidden
from .results import OURS, RIVAL, Error, Row, Work

SEED = 1337


@dataclass(frozen=True)
class Request:
    """Texts to go on with: `batch_size` of `prompt` tokens, by `new` tokens each, from weights held as `weights`."""

    batch_size: int
    prompt: int
    new: int
    weights: Weights
    why: str

    @property
    def shape(self) -> str:
        """The texts, as the table shows them."""
        return f"B={self.batch_size} {self.prompt}+{self.new}"


@dataclass(frozen=True)
class Desk:
    """A model, and what is asked of it."""

    config: GPTConfig
    requests: tuple[Request, ...]
    seconds: float  # for each request

    @property
    def shape(self) -> str:
        """Layers and width, as the table shows them."""
        return f"{self.config.n_layer}x{self.config.n_embd}"


DESK = Desk(
    GPTConfig(block_size=512, n_layer=6, n_head=6, n_embd=384),
    (
        Request(1, 32, 64, "float32", "one text: every token waits for all weights"),
        Request(1, 32, 64, "bfloat16", "the same in half the bytes"),
        Request(1, 32, 64, "int8", "and in a quarter"),
        Request(32, 32, 16, "float32", "a batch shares the weights"),
        Request(1, 448, 1, "float32", "reading a prompt"),
    ),
    seconds=3.0,
)
QUICK_DESK = Desk(
    GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=64),
    (
        Request(1, 8, 8, "float32", "one text"),
        Request(1, 8, 8, "int8", "in 8 bits"),
        Request(4, 8, 4, "bfloat16", "a batch"),
        Request(1, 8, 1, "float32", "reading a prompt"),
    ),
    seconds=0.1,
)


def generation_rows(desk: Desk, ceilings: Ceilings, advance: Callable[[], None]) -> Iterator[Row]:
    """A row for every request; `advance` is called after each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = GPT(desk.config, TRILBY).eval()
    for request in desk.requests:
        yield _row(desk, model, request, ceilings)
        advance()


def work_of(config: GPTConfig, request: Request, ceilings: Ceilings) -> Work:
    """Reading all weights that multiply once a token, or multiplying with them: whichever takes longer here."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[request.weights]
    multiplying = parameter_count(config) - config.block_size * config.n_embd
    moved = size * multiplying * request.new
    logits = config.vocab_size * config.n_embd  # of each new token alone; all else of every token that is read
    per_text = (multiplying - logits) * (request.prompt + request.new - 1) + logits * request.new
    operations = 2.0 * per_text * request.batch_size
    rate = ceilings.flops["bfloat16" if request.weights == "bfloat16" else "float32"]
    read, multiplied = Work(moved, "byte", ceilings.bandwidth(moved)), Work(operations, "flop", rate)
    return max(read, multiplied, key=lambda work: work.amount / work.ceiling)


@dataclass(frozen=True)
class Contestant:
    """A model that can be asked.

    Attributes:
        generate: The texts (B, T) and so many new tokens, greedily, (B, T + new).
        logits: Of the token after each of the last so many tokens of the texts (B, T).
        truth: The same logits in float64, with the weights that this contestant has.
    """

    generate: Callable[[Tensor, int], Tensor]
    logits: Callable[[Tensor, int], Tensor]
    truth: Callable[[Tensor, int], Tensor]


def ours(model: GPT, weights: Weights) -> Contestant:
    """The reference GPT on trilby's layers, its logits made as in generating: with the cache, a token at a time."""
    held = hold(copy.deepcopy(model), weights)
    return Contestant(lambda texts, new: generate(held, texts, new, GREEDY), _step_by_step(held), _exact(held))


def rival(model: GPT, weights: Weights) -> Contestant:
    """Transformers on the same weights, in float32 in place of int8, which it has not; or PyTorch's layers."""
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model)
        plain = load_pretrained(folder, PYTORCH).to(dtype)
        try:
            with our_folders_hidden():
                theirs = _transformers_model(folder, dtype)
        except ImportError:
            return Contestant(
                lambda texts, new: generate(plain, texts, new, GREEDY), _step_by_step(plain), _exact(plain)
            )

    def logits(texts: Tensor, count: int) -> Tensor:
        found: Tensor = theirs(texts).logits[:, -count:]
        return found

    def go_on(texts: Tensor, new: int) -> Tensor:
        seen = torch.ones_like(texts)  # or it would take token 0 for padding
        options = {"attention_mask": seen, "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        found: Tensor = theirs.generate(texts, **options)
        return found

    return Contestant(go_on, logits, _exact(plain))


def _transformers_model(folder: str, dtype: torch.dtype) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # nothing ends a text here
    return model


def _step_by_step(model: GPT) -> Callable[[Tensor, int], Tensor]:
    def logits(texts: Tensor, count: int) -> Tensor:
        cache = model.make_cache(len(texts), texts.shape[1])
        first = texts.shape[1] - count + 1
        parts = [texts[:, :first], *(texts[:, at : at + 1] for at in range(first, texts.shape[1]))]
        return torch.stack([model.next_logits(part, cache) for part in parts], dim=1)

    return logits


def _exact(model: GPT) -> Callable[[Tensor, int], Tensor]:
    """`model` as it is, weights rounded or not, in float64 on PyTorch's layers."""
    exact = dense(model, PYTORCH, torch.float64)

    def logits(texts: Tensor, count: int) -> Tensor:
        found: Tensor = exact(texts)[:, -count:]
        return found

    return logits


def _row(desk: Desk, model: GPT, request: Request, ceilings: Ceilings) -> Row:
    sides = {RIVAL: rival(model, request.weights), OURS: ours(model, request.weights)}
    generator = torch.Generator().manual_seed(SEED)
    texts = torch.randint(desk.config.vocab_size, (request.batch_size, request.prompt), generator=generator)
    with torch.no_grad():
        whole = sides[RIVAL].generate(texts, request.new)[:, :-1]
        truths = {name: side.truth(whole, request.new) for name, side in sides.items()}
        by = {name: largest_difference(side.logits(whole, request.new), truths[name]) for name, side in sides.items()}
        calls = {name: partial(side.generate, texts, request.new) for name, side in sides.items()}
        seconds = interleaved(calls, Budget(seconds=desk.seconds))
    moved = largest_difference(truths[OURS], truths[RIVAL]) / truths[RIVAL].abs().max().item()
    return Row(
        "GPT generation",
        f"{desk.shape} {request.shape}",
        request.weights,
        "text",
        request.why,
        seconds,
        work_of(desk.config, request, ceilings),
        (Error("logits", by, _floor(request.weights, truths[OURS])),),
        setting=f"logits off {moved:.1%}" if request.weights == "int8" else "",
    )


def _floor(weights: Weights, truth: Tensor) -> float:
    """What correct rounding alone may cost logits as large as these, as in the tests' rule."""
    rounding = torch.finfo(torch.bfloat16 if weights == "bfloat16" else torch.float32).eps / 2
    return truth.abs().max().item() * (rounding + 4 * torch.finfo(torch.float32).eps)
