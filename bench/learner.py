"""A contestant of `step` in a process of its own, so that its memory, and how it is allocated, are its own too."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from trilby.gpt import GPT, PRESETS, PYTORCH, TRILBY, TrainConfig
from trilby.gpt.train import make_optimizer
from trilby.kernels import keep_memory

from .memory import begin_peak, end_peak
from .models import hugging_face
from .results import OURS, RIVAL

COMPILED, HUGGING_FACE = f"{RIVAL}, compiled", "Hugging Face"
# What an operator is called, by parts of its name; the first that fits.
PARTS = (
    ("optimizer", ("adam", "foreach", "norm_except", "clip")),
    ("attention", ("attention", "flash", "softmax", "dropout", "bernoulli")),
    ("norms", ("layer_norm", "add_norm", "norm")),
    ("GELU", ("gelu", "tanh", "pow")),
    ("matrix products", ("mm", "linear", "matmul", "bmm", "dot")),
    ("casts and copies", ("copy", "_to", "clone", "cat", "contiguous", "fill", "zero")),
    ("loss", ("loss", "cross", "exp", "logsumexp", "index", "gather", "scatter")),
)


@dataclass(frozen=True)
class Lesson:
    """What every contestant is given at each step."""

    batch_size: int  # B
    length: int  # T
    dropout: float
    precision: str  # "bfloat16" is autocast
    size: str = "gpt2"

    @property
    def tokens(self) -> int:
        """How many are predicted in a step."""
        return self.batch_size * self.length

    def __str__(self) -> str:
        return f"B={self.batch_size} T={self.length} dropout {self.dropout:g} {self.precision}"


@dataclass(frozen=True)
class Told:
    """What the process of a contestant is started with."""

    contestant: str
    lesson: Lesson
    threads: int
    keep: bool  # the memory that it frees


class Learner:
    """A contestant at work on a lesson; `with` ends its process."""

    def __init__(self, told: Told) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, told), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join()

    def step(self) -> float:
        """Train by a step; its seconds."""
        return self._ask("step")  # type: ignore[no-any-return]

    def peak(self) -> int | None:
        """The most bytes that it had, since its second step, beyond those of the libraries; None: no one can tell."""
        return self._ask("peak")  # type: ignore[no-any-return]

    def shares(self) -> Counter[str]:
        """The parts of a step's time; this trains by a step, too."""
        return self._ask("shares")  # type: ignore[no-any-return]

    def _ask(self, what: str) -> Any:
        self._here.send(what)
        try:
            return self._here.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contestant's process ended with {self._process.exitcode}, at {what}") from None


def _serve(there: Connection, told: Told) -> None:
    torch.set_num_threads(told.threads)
    if told.keep:
        keep_memory()
    before = begin_peak()
    call = make_step(told.contestant, told.lesson)
    # On one thread the processor's time, so that a busy machine matters little.
    clock = time.process_time if told.threads == 1 else time.perf_counter
    steps = 0
    while True:
        try:
            asked = there.recv()
        except EOFError:  # no one asks any more
            return
        if asked == "step":
            if steps == 1:
                begin_peak()  # the first made what stays, and compiled what is compiled
            started = clock()
            call()
            steps += 1
            there.send(clock() - started)
        elif asked == "peak":
            there.send(end_peak(before))
        else:
            there.send(shares_of(call))


def make_step(contestant: str, lesson: Lesson) -> Callable[[], None]:
    """A call of it trains the contestant by one step: forward, backward, clipping, a fused AdamW."""
    config = replace(PRESETS[lesson.size], dropout=lesson.dropout)
    B, T = lesson.batch_size, lesson.length
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1337))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model: nn.Module
    if contestant == HUGGING_FACE:
        model = hugging_face(replace(config, block_size=max(T, config.block_size)))
        loss: Callable[[Tensor, Tensor], Tensor] = partial(_loss_of_logits, model)
    else:
        model = gpt = GPT(config, TRILBY if contestant == OURS else PYTORCH)
        loss = gpt.loss if contestant == OURS else partial(_loss_of_logits, gpt)
        for block in gpt.transformer.h if contestant == COMPILED else ():
            block.compile()  # all by one piece of code, so that compiling takes seconds
    optimizer = make_optimizer(model, TrainConfig())
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=lesson.precision == "bfloat16"):
            value = loss(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _loss_of_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def shares_of(call: Callable[[], None]) -> Counter[str]:
    """The parts of a call's time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[part_of(event.key)] += event.self_cpu_time_total
    total = sum(times.values())
    return Counter({part: time / total for part, time in times.items()})


def part_of(operator: str) -> str:
    """What an operator, or a node of the backward, belongs to."""
    name = operator.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), "the rest")
