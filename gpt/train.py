"""Training a GPT: AdamW, warm-up and cosine, accumulation, clipping, evaluation.

    training = Training.start(GPTConfig(...), TrainConfig(...), split(ids))
    result = training.run()

A `Training` owns everything that its next step depends on, random numbers included: two of them can take turns and
each goes as it would alone, on a CPU bit for bit, and PyTorch's global generator is left as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .config import GPTConfig, TrainConfig
from .data import IGNORED, Batches, Prefetched, RandomBatches, Split, Tokens, largest_id, make_batches
from .layers import TRILBY, Layers
from .model import GPT


@dataclass(frozen=True)
class Step:
    """What one training step did."""

    number: int  # counted from 1
    loss: float  # of this step's batches, before the update, in nats per token
    learning_rate: float
    seconds: float  # from fetching the batch to the updated weights, evaluation left out
    tokens: int  # that were predicted
    validation_loss: float | None = None  # after the update, on the steps that evaluate


@dataclass
class Result:
    """What a run of training did, one entry per step of this run."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation_losses: dict[int, float] = field(default_factory=dict)  # by step

    def add(self, step: Step) -> None:
        """Take `step` into account."""
        self.losses.append(step.loss)
        self.seconds.append(step.seconds)
        if step.validation_loss is not None:
            self.validation_losses[step.number] = step.validation_loss


@dataclass
class Training:
    """A GPT in training, between two steps."""

    model: GPT
    config: TrainConfig
    tokens: Split
    optimizer: torch.optim.AdamW
    batches: Batches
    dropout_state: Tensor  # of the generator that dropout draws from, on the device of the model
    steps_done: int = 0

    @classmethod
    def start(cls, model: GPTConfig, config: TrainConfig, tokens: Split, layers: Layers = TRILBY) -> Training:
        """A new GPT, its weights and everything after them drawn from `config.seed`.

        Raises:
            ValueError: `tokens` are too few for one batch, or not all in the vocabulary, or the device is unknown.
        """
        device = check_device(config.device)
        if (largest := largest_id(tokens)) >= model.vocab_size:
            raise ValueError(f"tokens has the id {largest}; vocab_size is {model.vocab_size}")
        batches = prefetched_batches(tokens, config, model)
        if config.eval_interval:
            validation_batches(tokens.validation, config, model)  # too short a text is an error now, not in an hour
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            gpt = GPT(model, layers).to(device)
            dropout = torch.get_rng_state()
        if device.type == "cuda":
            dropout = torch.Generator(device).manual_seed(config.seed).get_state()
        return cls(gpt, config, tokens, make_optimizer(gpt, config), batches, dropout)

    def __post_init__(self) -> None:
        if self.config.compile:
            self.model.transformer.compile()  # in place: names and checkpoints stay what they are

    def step(self) -> Step:
        """`config.accumulation_steps` batches, forward and backward; clip, update."""
        started = time.perf_counter()
        config, parameters = self.config, list(self.model.parameters())
        rate = learning_rate(self.steps_done, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = [self.batches.next() for _ in range(config.accumulation_steps)]
        count = sum(int((batch.y != IGNORED).sum()) for batch in batches)  # so that each target weighs the same

        self.model.train()
        loss = torch.zeros((), device=parameters[0].device)
        with self._own_dropout():
            for batch in batches:
                with _precision(self.model, config):
                    share = self.model.loss(*batch.to(loss.device), count)
                share.backward()
                loss += share.detach()
        if config.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return Step(self.steps_done, loss.item(), rate, time.perf_counter() - started, count)

    def run(
        self,
        on_step: Callable[[Step], None] | None = None,
        save: Callable[[Training], None] | None = None,
    ) -> Result:
        """Step until `config.max_steps`.

        Args:
            on_step: told of every step after it.
            save: called every `config.save_interval` steps and after the last.
        """
        result, config = Result(), self.config
        while self.steps_done < config.max_steps:
            step = self.step()
            last = self.steps_done == config.max_steps
            if config.eval_interval and (last or self.steps_done % config.eval_interval == 0):
                step = replace(step, validation_loss=evaluate(self.model, self.tokens.validation, config))
            result.add(step)
            if on_step is not None:
                on_step(step)
            if save is not None and (last or self.steps_done % config.save_interval == 0):
                save(self)
        return result

    @contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Let dropout, which has no generator argument, draw from this training's own."""
        device = next(self.model.parameters()).device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            if cuda:
                torch.cuda.set_rng_state(self.dropout_state, device)
            else:
                torch.set_rng_state(self.dropout_state)
            yield
            self.dropout_state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()


def train(
    model: GPTConfig,
    config: TrainConfig,
    tokens: Split,
    layers: Layers = TRILBY,
    on_step: Callable[[Step], None] | None = None,
) -> Result:
    """Train a new GPT from `config.seed` and return its losses; see `Training` to keep the GPT."""
    return Training.start(model, config, tokens, layers).run(on_step)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, …: rises in a line over the warm-up, then falls along half a cosine to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings, and none on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, config: TrainConfig) -> float:
    """Mean loss over `config.eval_batches` random batches of `tokens`, the same ones every time."""
    batches = validation_batches(tokens, config, model.config)
    device = next(model.parameters()).device
    model.eval()
    with _precision(model, config):
        drawn = (batches.next() for _ in range(config.eval_batches))
        losses = [model.loss(batch.x.to(device), batch.y.to(device)).item() for batch in drawn]
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate_all(model: GPT, tokens: Tokens, config: TrainConfig) -> float:
    """Mean loss over all of `tokens`, T at a time: what `evaluate` estimates.

    On the last tenth of Shakespeare, the estimate of 20 batches of 12 x 64 is off by 0.017 (standard deviation).
    """
    T, device = model.block_size, next(model.parameters()).device
    model.eval()
    total, rows = 0.0, (len(tokens) - 1) // T
    with _precision(model, config):
        for first in range(0, rows, config.batch_size):
            starts = torch.arange(first, min(first + config.batch_size, rows)) * T
            chunks = tokens[starts[:, None] + torch.arange(T + 1)].to(device)
            total += model.loss(chunks[:, :-1], chunks[:, 1:]).item() * len(chunks)
    return total / rows


def validation_batches(tokens: Tokens, config: TrainConfig, model: GPTConfig) -> RandomBatches:
    """The batches that `evaluate` reads: random ones, from `config.seed`."""
    generator = torch.Generator().manual_seed(config.seed)
    return RandomBatches(tokens, config.batch_size, model.block_size, generator)


def prefetched_batches(tokens: Split, config: TrainConfig, model: GPTConfig) -> Prefetched:
    """The batches to train on, each loaded while the step before it computes."""
    batches = make_batches(config.sampler, tokens, config.batch_size, model.block_size, config.seed)
    return Prefetched(batches, torch.device(config.device))


def check_device(name: str) -> torch.device:
    """The device called `name`; ValueError if this machine has none of that name."""
    cards = torch.cuda.device_count()
    available = ["cpu"] + ["cuda"] * (cards > 0) + [f"cuda:{card}" for card in range(cards)]
    if name not in available:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(available)}")
    return torch.device(name)


def _precision(model: nn.Module, config: TrainConfig) -> torch.autocast:
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")
