"""Which token comes next: from the logits of all to the one that is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers drawn by `torch.multinomial`, as nanoGPT does, so that small vocabularies give the same texts from the same
# seeds. It draws an exponential number for every token there is: of 50,257, on one thread, 1,690 µs, where looking one
# uniform number up in the running sum takes 85.
MOST_FOR_MULTINOMIAL = 1024
# Sorting 50,257 probabilities to find the nucleus takes 5,400 µs, finding the largest of them 210. If these are
# likelier than top_p together, the nucleus is among them.
NUCLEUS_CANDIDATES = 1024


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; the defaults draw from the model's own distribution.

    Raises ValueError for a temperature below 0, a top_k below 1 or a top_p outside of (0, 1].
    """

    temperature: float = 1.0  # below 1 sharper, above 1 flatter; 0 is greedy: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the fewest tokens that are together as likely as p (nucleus sampling)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


PLAIN = Sampling()
GREEDY = Sampling(temperature=0.0)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, (B, 1), given the `logits` (B, V); from PyTorch's global generator, if `generator` is None."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    probabilities, ids = _candidates(logits, sampling)
    if probabilities.shape[1] <= MOST_FOR_MULTINOMIAL:
        drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)
    else:
        drawn = _look_up(probabilities, generator)
    return drawn if ids is None else ids.gather(1, drawn)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution, (B, V), that `draw` draws from, given the `logits` (B, V).

    In this order: temperature, top-k, top-p. Of equally likely tokens at the border of top-k or top-p, as many stay as
    fit. Greedy puts everything on the likeliest token.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    probabilities, ids = _candidates(logits, sampling)
    return probabilities if ids is None else torch.zeros_like(logits).scatter_(1, ids, probabilities)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn: how likely each is, (B, K), and its id; None if they are all, in order."""
    logits, ids = logits / sampling.temperature, None
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        logits, ids = logits.topk(sampling.top_k)
    probabilities = logits.softmax(dim=1)
    if sampling.top_p is None or sampling.top_p == 1:
        return probabilities, ids
    ordered, order = _likeliest(probabilities, sampling.top_p)
    before = ordered.cumsum(dim=1) - ordered  # how much is likelier than each
    kept = ordered.masked_fill_(before >= sampling.top_p, 0.0)
    kept /= kept.sum(dim=1, keepdim=True)
    return kept, order if ids is None else ids.gather(1, order)


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest first: all, or so many that they make up `top_p` in every row."""
    if probabilities.shape[1] > NUCLEUS_CANDIDATES:
        largest = probabilities.topk(NUCLEUS_CANDIDATES)
        if bool((largest.values.sum(dim=1) > top_p).all()):
            return largest.values, largest.indices
    return probabilities.sort(dim=1, descending=True, stable=True)


def _look_up(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token whose share of the running sum a uniform number falls in."""
    until = probabilities.cumsum(dim=1, dtype=torch.float64)  # the likely ones must not round the unlikely ones away
    shape = (len(probabilities), 1)
    point = torch.rand(shape, generator=generator, dtype=until.dtype, device=until.device) * until[:, -1:]
    return torch.searchsorted(until, point, right=True).clamp_(max=until.shape[1] - 1)
