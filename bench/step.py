"""`python -m trilby.bench.step`: whole training steps of GPT-2, in turns, and where their time goes.

The reference GPT on trilby's layers, the same on PyTorch's, and Hugging Face's where transformers is installed; the
weights of each are drawn anew. A step is forward, backward, clipping and a fused AdamW. Shares are the profiler's, of
the operators' own time on one step after the others; page faults are in whatever touched the page.

At the size of GPT-2 a step takes seconds on two threads, so this is no part of `make bench`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from trilby.gpt import GPT, PRESETS, PYTORCH, TRILBY, TrainConfig
from trilby.gpt.train import make_optimizer
from trilby.kernels import keep_memory

from .measure import quantiles
from .memory import peak_bytes
from .models import has_transformers, hugging_face
from .results import OURS, RIVAL

HUGGING_FACE = "Hugging Face"
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

    x: Tensor
    y: Tensor
    precision: str

    def step(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        """A call of it trains `model` by one step."""
        optimizer = make_optimizer(model, TrainConfig())
        model.train()

        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                value = loss(self.x, self.y)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call


def main(arguments: Sequence[str]) -> int:
    """Print tokens a second, memory and shares of each contestant."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.step", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4, metavar="B", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=256, metavar="T", help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="in turns; default: %(default)s")
    parser.add_argument("--size", choices=sorted(PRESETS), default="gpt2", help="default: %(default)s")
    parser.add_argument("--only", nargs="*", choices=(OURS, RIVAL, HUGGING_FACE), help="default: all that there are")
    options = parser.parse_args(arguments)
    keep_memory()
    calls = contestants(options)
    peaks = {name: peak_bytes(call)[1] for name, call in calls.items()}  # the first also allocates what stays
    # On one thread the processor's time, so that a busy machine matters little.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.steps):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    tokens = options.batch_size * options.length
    for name, each in seconds.items():
        peak = peaks[name]
        memory = "" if peak is None else f", {peak / 1e9:.2f} GB more at its peak"
        ratio = quantiles([other / mine for other, mine in zip(each, seconds.get(OURS, each))]).p50
        print(f"{name}: {tokens / quantiles(each).p50:.0f} tokens/s, {ratio:.2f} of trilby's time{memory}")
    for name, call in calls.items():
        shares = shares_of(call)
        print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.most_common()))
    return 0


def contestants(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A step of each, by name."""
    config = replace(PRESETS[options.size], dropout=options.dropout)
    B, T = options.batch_size, options.length
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1337))
    lesson = Lesson(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), options.precision)
    steps = {}
    for name in options.only or (OURS, RIVAL, *(HUGGING_FACE,) * has_transformers()):
        if name == HUGGING_FACE:
            theirs = hugging_face(replace(config, block_size=max(T, config.block_size)))
            steps[name] = lesson.step(theirs, partial(_loss_of_logits, theirs))
        else:
            model = GPT(config, TRILBY if name == OURS else PYTORCH)
            steps[name] = lesson.step(model, model.loss)
    return steps


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
