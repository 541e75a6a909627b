"""Your model, one line: unchanged models trained and run with `trilby.kernels.activate()` and without, in turns."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trilby.gpt import CharTokenizer, GPTConfig, default_text, split
from trilby.kernels import activated

from .machine import Ceilings
from .measure import quantiles
from .memory import peak_bytes
from .models import Model, models
from .results import OURS, RIVAL, Row, Training, Work

_SIDES: dict[str, Callable[[], AbstractContextManager[None]]] = {RIVAL: nullcontext, OURS: activated}
# Steps whose time is not counted: the first ones also allocate the gradients and the optimizer's state.
WARM_UP = 2


@dataclass(frozen=True)
class Trial:
    """What each model is put to: its shape, batches of whole contexts, and so many steps of training and calls."""

    config: GPTConfig
    batch_size: int
    steps: int
    calls: int

    @property
    def shape(self) -> str:
        """As the table shows it."""
        config = self.config
        heads = f"{config.n_head}x{config.n_embd // config.n_head}"
        return f"{config.n_layer} layers {heads} B={self.batch_size} T={config.block_size}"


# Steps of a sixth of a second on two processors: ten give a median, and the whole benchmark is to end in four minutes.
# Attention is a tenth of a step of one text of 512 tokens; of two of 256, a twentieth, which ten steps do not show.
TRIAL = Trial(GPTConfig(block_size=512, n_layer=3, n_head=6, n_embd=384), batch_size=1, steps=10, calls=16)
QUICK_TRIAL = Trial(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=64), batch_size=2, steps=5, calls=8)


@dataclass
class _Contestant:
    """A model in training.

    Attributes:
        model: Its own copy.
        optimizer: Of its parameters.
        run: What it is run within: nothing, or `activated()`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Callable[[], AbstractContextManager[None]]

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step of training; its loss."""
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def trial_steps(trial: Trial) -> int:
    """How many times `try_models` calls `advance`."""
    return len(models()) * (trial.steps + trial.calls)


def try_models(
    trial: Trial, ceilings: Ceilings, advance: Callable[[], None]
) -> tuple[tuple[Row, ...], tuple[Training, ...]]:
    """Two rows of the table and a pair of loss curves for each model."""
    text = default_text()
    tokenizer = CharTokenizer.from_text(text.content)
    tokens = torch.as_tensor(split(tokenizer.encode(text.content)).train)
    trial = replace(trial, config=replace(trial.config, vocab_size=tokenizer.vocab_size))
    rows: list[Row] = []
    trainings = []
    for model in models():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batches = list(_batches(model, trial, tokens))
            contestants = _contestants(model.make(trial.config))
        losses, seconds = _train(contestants, batches[1:], advance)
        rows.append(_row(model, trial, contestants, "step", seconds, ceilings))
        rows[-1] = replace(rows[-1], peak_bytes=_peaks(contestants, *batches[0]))
        seconds = _infer(contestants, batches[0][0], trial.calls, advance)
        rows.append(_row(model, trial, contestants, "forward", seconds, ceilings))
        tokens_a_batch = trial.batch_size * trial.config.block_size
        rates = {name: tokens_a_batch / quantiles(each).p50 for name, each in rows[-2].seconds.items()}
        trainings.append(Training("float32", text.source, losses, rates, model.name))
    return tuple(rows), tuple(trainings)


def _batches(model: Model, trial: Trial, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, one more than there are steps: the next tokens, or the same for a model that sees those."""
    T = trial.config.block_size
    for _ in range(trial.steps + 1):
        starts = torch.randint(len(tokens) - T - 1, (trial.batch_size,)).tolist()
        batch = torch.stack([tokens[start : start + T + 1] for start in starts]).long()
        yield batch[:, :-1], batch[:, 1:] if model.is_causal else batch[:, :-1]


def _contestants(model: nn.Module) -> dict[str, _Contestant]:
    """Two models that begin alike."""
    contestants = {}
    for name, run in _SIDES.items():
        own = copy.deepcopy(model)
        contestants[name] = _Contestant(own, torch.optim.AdamW(own.parameters(), lr=3e-4), run)
    return contestants


def _in_turns(
    contestants: dict[str, _Contestant], call: Callable[[_Contestant], float]
) -> dict[str, tuple[float, float]]:
    """What `call` returns, and the seconds it takes, by contestant; putting trilby in PyTorch's place is not timed."""
    found = {}
    for name, contestant in contestants.items():
        with contestant.run():
            start = time.perf_counter()
            result = call(contestant)
            found[name] = result, time.perf_counter() - start
    return found


def _train(
    contestants: dict[str, _Contestant], batches: list[tuple[Tensor, Tensor]], advance: Callable[[], None]
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    """The losses, and the seconds of each step after the first few, by contestant."""
    rounds = []
    for tokens, targets in batches:
        rounds.append(_in_turns(contestants, lambda side, b=(tokens, targets): side.step(*b)))  # type: ignore[misc]
        advance()
    losses = {name: tuple(found[name][0] for found in rounds) for name in contestants}
    return losses, {name: tuple(found[name][1] for found in rounds[WARM_UP:]) for name in contestants}


def _infer(
    contestants: dict[str, _Contestant], tokens: Tensor, calls: int, advance: Callable[[], None]
) -> dict[str, tuple[float, ...]]:
    """The seconds of each call after the first few, by contestant."""

    def call(side: _Contestant) -> float:
        with torch.no_grad():
            side.model(tokens)
        return 0.0

    for contestant in contestants.values():
        contestant.model.eval()
    rounds = []
    for _ in range(calls):
        rounds.append(_in_turns(contestants, call))
        advance()
    return {name: tuple(found[name][1] for found in rounds[WARM_UP:]) for name in contestants}


def _peaks(contestants: dict[str, _Contestant], tokens: Tensor, targets: Tensor) -> dict[str, int | None]:
    """The memory that a step needs beyond weights and the optimizer's state."""
    peaks = {}
    for name, contestant in contestants.items():
        contestant.optimizer.zero_grad(set_to_none=True)
        with contestant.run():
            peaks[name] = peak_bytes(lambda step=contestant.step: step(tokens, targets))[1]  # type: ignore[misc]
    return peaks


def _row(
    model: Model,
    trial: Trial,
    contestants: dict[str, _Contestant],
    direction: Literal["step", "forward"],
    seconds: dict[str, tuple[float, ...]],
    ceilings: Ceilings,
) -> Row:
    work = Work(
        model.flops(trial.config, trial.batch_size, contestants[RIVAL].model, direction),
        "flop",
        ceilings.flops["float32"],
    )
    why = "an unchanged model, with and without activate()"
    return Row(model.name, trial.shape, "float32", direction, why, seconds, work)
