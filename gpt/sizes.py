"""The published sizes of GPTs: how many parameters they have, and what memory they take."""

from __future__ import annotations

import torch

from .config import PRESETS, GPTConfig
from .model import GPT

GIB = 2**30
BYTES_TO_TRAIN = 16  # a parameter in float32, its gradient, and the two moments of AdamW
HEADING = ("preset", "layers", "heads", "width", "context", "parameters", "float32", "bfloat16", "to train")


def count_parameters(config: GPTConfig) -> int:
    """The parameters of a GPT that is really made, on the meta device, where numbers take no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def presets_table() -> list[tuple[str, ...]]:
    """A heading, and a row for each preset; memory is of the weights, and to train of all that each of them needs."""
    rows: list[tuple[str, ...]] = [HEADING]
    for name, config in PRESETS.items():
        count = count_parameters(config)
        shape = (config.n_layer, config.n_head, config.n_embd, config.block_size)
        memory = (f"{count * size / GIB:,.2f} GiB" for size in (4, 2, BYTES_TO_TRAIN))
        rows.append((name, *map(str, shape), f"{count:,}", *memory))
    return rows


def lines_of(rows: list[tuple[str, ...]]) -> list[str]:
    """A line for each row; the first column flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
