"""Random numbers by position: the same mask for every kernel, whatever its tiles, threads and device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import computed


def _multiply_wide(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of 32-bit words; int64 wraps around, which leaves all 64 bits right."""
    product = a * factor
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(counter: Sequence[Tensor], seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        counter: Four int64 tensors of 32-bit words, which broadcast.
        seed: [1] int64, all 64 bits of it: the key.

    Returns:
        [4, *broadcast shape] int64 from 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3))


def random_words(seed: Tensor, plane: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """A random 32-bit word for each element of a matrix, as the norms' dropout counts them (csrc/random.h).

    Args:
        seed: [1] int64.
        plane: int64 below 2^32: which matrix; 0 for a norm.
        row: int64.
        column: int64; broadcasts with `plane` and `row`.

    Returns:
        int64 from 0 to 2^32 - 1, of the broadcast shape.
    """
    group, lane, number = column // 64, column % 16, column % 64 // 16
    words = philox((group * 16 + lane, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, plane), seed)
    return words.gather(0, number.expand(words.shape[1:]).unsqueeze(0)).squeeze(0)


def dropout_factors(seed: Tensor, like: Tensor, normalized_dims: int, dropout_p: float) -> Tensor:
    """What dropout multiplies by, 0 with probability `dropout_p` and else 1 / (1 - p), in the dtype computed with."""
    rows = like.flatten(0, -normalized_dims - 1) if like.dim() > normalized_dims else like.unsqueeze(0)
    rows = rows.flatten(1)
    row = torch.arange(rows.shape[0], device=like.device).unsqueeze(1)
    column = torch.arange(rows.shape[1], device=like.device)
    words = random_words(seed, torch.zeros_like(column), row, column)
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return ((words >= threshold) * scale).to(computed(like).dtype).view(like.shape)


def attention_dropout_factors(seed: Tensor, plane: Tensor, row: Tensor, columns: int, dropout_p: float) -> Tensor:
    """What attention's dropout multiplies probabilities by: 0, or what keeps their mean.

    The probability is rounded to a multiple of 2^-16, and what is kept is scaled by the rounded one, so that one call
    of `philox` serves a query and 8 keys: number j % 8 of its eight 16-bit halves, low ones first, is key j's.

    Args:
        seed: [1] int64.
        plane: [planes] int64: the number of each head, batch · H + head.
        row: [T] int64: the numbers of the queries.
        columns: How many keys there are, S.
        dropout_p: The probability that a pair is dropped.

    Returns:
        [planes, T, S] float32.
    """
    octets = torch.arange((columns + 7) // 8, device=seed.device)
    counter = (row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, octets, plane)
    shapes = ((1, -1, 1), (1, -1, 1), (1, 1, -1), (-1, 1, 1))
    words = philox([word.view(shape) for word, shape in zip(counter, shapes)], seed)  # [4, planes, T, octets]
    numbers = torch.stack((words & 0xFFFF, words >> 16)).permute(2, 3, 4, 1, 0).flatten(2)[..., :columns]
    threshold = round(dropout_p * 2**16)
    return (numbers >= threshold) * (2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0)
