"""Which kernel serves which layer of a GPT, and where it is not trilby's, why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from trilby import kernels

from .model import GPT, MLP, AddNorm, CausalSelfAttention

# The layers with a choice of kernels.
TRACED = (AddNorm, CausalSelfAttention, MLP)
# The layer that a token's way through all blocks in one call is told of as.
ALL_BLOCKS = "h.*, ln_f"


@dataclass(frozen=True)
class Trace:
    """One call of a kernel."""

    layer: str  # the name of the module
    called: str  # the function, its inputs, who computed it and, if that is not trilby, every reason
    is_trilbys: bool


def trace(model: GPT, run: Callable[[], object]) -> list[Trace]:
    """Call `run`, which uses `model` on a CPU, and tell of every kernel that was called on the way forward."""
    found: list[Trace] = []
    with _watched(model, found):
        run()
    return found


def describe(model: GPT, batch_size: int, length: int) -> Iterator[str]:
    """What serves `model` in training, in reading a prompt and in writing on, line by line.

    Args:
        model: On a CPU.
        batch_size: B.
        length: T, of the text that is trained on, and of the prompt.
    """
    tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    cache = model.make_cache(batch_size)
    occasions: dict[str, Callable[[], Any]] = {
        f"training, tokens {tuple(tokens.shape)}": lambda: model.loss(tokens, tokens),
        f"reading a prompt, tokens {tuple(tokens.shape)}": lambda: model.next_logits(tokens, cache),
        f"writing on, tokens {(batch_size, 1)}": lambda: model.next_logits(tokens[:, :1], cache),
    }
    for occasion, run in occasions.items():
        training = occasion.startswith("training")
        model.train(training)
        with torch.set_grad_enabled(training):
            traces = trace(model, run)
        yield f"{occasion}:"
        for layers, called in _alike(traces):
            yield f"    {layers:<24} {called}"
        yield ""


def _alike(traces: Sequence[Trace]) -> Iterator[tuple[str, str]]:
    """The calls, those of the same kind in one: "h.*.attn (12)"."""
    counts: dict[tuple[str, str], int] = {}
    for each in traces:
        parts = each.layer.split(".")
        kind = ".".join("*" if part.isdecimal() else part for part in parts), each.called
        counts[kind] = counts.get(kind, 0) + 1
    for (layer, called), count in counts.items():
        yield (f"{layer} ({count})" if count > 1 else layer), called


@contextmanager
def _watched(model: GPT, found: list[Trace]) -> Iterator[None]:
    """Append a `Trace` to `found` for each kernel that a traced layer calls."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TRACED)}
    watched: list[tuple[nn.Module, str, str]] = [(model.transformer, "decode", ALL_BLOCKS)]
    watched += [(module, "forward", name.removeprefix("transformer.")) for name, module in layers.items()]
    for module, method, name in watched:
        setattr(module, method, _telling(getattr(module, method), name, found))
    try:
        yield
    finally:
        for module, method, _ in watched:
            delattr(module, method)  # the class's is there again


def _telling(method: Callable[..., Any], name: str, found: list[Trace]) -> Callable[..., Any]:
    def tell(*arguments: Any, **options: Any) -> Any:
        results: list[Any] = []
        explained = kernels.explain(lambda: results.append(method(*arguments, **options)))
        found.extend(Trace(name, str(each), each.is_trilbys) for each in explained)
        return results[0]

    return tell
