"""The stepping stones to attention: predicting from the last token alone, and averaging over what came before.

Each averaging function computes the same thing, `output[b, t] = mean of input[b, 0..t]`, one step nearer to attention:
first as it is said, then as a product with a triangular matrix, then with a softmax that makes the matrix. Attention
only replaces the zeros under the softmax by what query and key have to say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bigram(nn.Module):
    """Row i of one table holds the logits of what follows token i."""

    block_size = None  # any context will do, since only its last token counts

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T)."""
        logits: Tensor = self.token_embedding_table(tokens)
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of predicting `targets` (B, T) from `tokens` (B, T)."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def average_by_loop(input: Tensor) -> Tensor:
    """Mean of each position and all before it, (B, T, C) -> (B, T, C), as one would say it."""
    return torch.stack([input[:, : t + 1].mean(dim=1) for t in range(input.shape[1])], dim=1)


def average_by_matrix(input: Tensor) -> Tensor:
    """The same as a matrix product, (T, T) @ (B, T, C)."""
    return triangular_weights(input.shape[1], dtype=input.dtype) @ input


def average_by_softmax(input: Tensor) -> Tensor:
    """The same with the matrix made by a softmax: what attention does, if every score is 0."""
    return softmax_weights(input.shape[1], dtype=input.dtype) @ input


def triangular_weights(T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, T): row t is 1/(t+1) up to column t and 0 after it.

    T = 3::

        1    0    0
        1/2  1/2  0
        1/3  1/3  1/3
    """
    lower = torch.ones(T, T, dtype=dtype).tril()
    return lower / lower.sum(dim=1, keepdim=True)


def softmax_weights(T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix of `triangular_weights` as the softmax of scores that are 0 in the past and -inf in the future."""
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    return torch.zeros(T, T, dtype=dtype).masked_fill(future, float("-inf")).softmax(dim=1)
