"""The ids of a text, and which of them are for training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRAIN_SHARE = 0.9


class Split(NamedTuple):
    """The ids of a text, (N) int64: the first nine tenths to train on, the rest to validate with."""

    train: Tensor
    validation: Tensor


def split(ids: list[int] | Tensor) -> Split:
    """The first nine tenths of `ids`, (N), and the rest."""
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    border = int(TRAIN_SHARE * len(tokens))
    return Split(tokens[:border], tokens[border:])
