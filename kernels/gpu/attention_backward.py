"""Attention, backward: three kernels without atomics, so that the same inputs give the same bits.

Probabilities are computed again from the scores and the forward's logsumexp (FlashAttention-2, Dao, 2023). One program
owns a tile of keys and walks over the queries that see them (grad_key, grad_value); another owns a tile of queries and
walks over the keys that they see (grad_query). Scores are computed twice for it: 7 products of T x S x D instead of 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_inputs import AttentionInputs
from .attention_score import Rule, Scoring, probabilities_of, score, where_seen
from .attention_tiles import AttentionTiles, RowTiles
from .call import Call, addresses, alignment_of, heads, padded
from .tile import Heads, head_of, load_tokens

LOG2_E = 1.4426950408889634


# Memory: grad_output and output once; 4 bytes in and 8 out for every row of Dv.
@triton.jit(do_not_specialize=["head_count", "q_len"])
def attention_backward_rows_kernel(
    grad_output: Heads,  # [B, H, T, Dv]
    output: Heads,  # [B, H, T, Dv]
    logsumexp: tl.tensor,  # [B, H, T] float32, contiguous
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    unit: tl.tensor,
    head_count: tl.tensor,  # H
    q_len: tl.tensor,  # T
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """What every score of a row needs in the backward pass, once a row instead of once a score.

    exponent: what scores are less by when they become exponents of 2 (`probabilities_of`): logsumexp * unit; of a row
    that saw no key it is infinite, which makes the probabilities 0. delta: the sum of grad_output * output.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    first_row = program % tiles * BLOCK_M
    head = program // tiles % head_count
    batch = (program // tiles // head_count).to(tl.int64)
    grad_output_head = head_of(grad_output, batch, head, 0, ALIGNMENT)
    output_head = head_of(output, batch, head, 0, ALIGNMENT)
    grad_tile = load_tokens(grad_output_head, first_row, 0, q_len, VALUE_DIM, BLOCK_M, BLOCK_DV, True, "wide")
    output_tile = load_tokens(output_head, first_row, 0, q_len, VALUE_DIM, BLOCK_M, BLOCK_DV, True, "wide")
    product = grad_tile.to(tl.float32) * output_tile.to(tl.float32)
    rows = first_row + tl.arange(0, BLOCK_M)
    statistics = (batch * head_count + head) * q_len + rows
    row_logsumexp = tl.load(logsumexp + statistics, mask=rows < q_len, other=0.0)
    row_exponent = tl.where(row_logsumexp == float("-inf"), float("inf"), row_logsumexp * unit)
    tl.store(exponent + statistics, row_exponent, mask=rows < q_len)
    tl.store(delta + statistics, tl.sum(product, 1), mask=rows < q_len)


@triton.jit
def gradient_of_scores(
    products: tl.tensor,  # of queries and keys: [M, N], or [N, M]
    grad_products: tl.tensor,  # of grad_output and values
    queries: tl.tensor,
    keys: tl.tensor,
    exponent: tl.tensor,  # of the queries
    delta: tl.tensor,  # of the queries
    kept: tl.tensor,  # by dropout; None: all
    rule: Rule,
    scoring: Scoring,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The probabilities that values were weighed with, but for the scale of dropout; the scores; their gradient."""
    scores, slope_of_softcap = score(products, queries, keys, rule, scoring, MASKED)
    probabilities = probabilities_of(scores, exponent, rule, scoring, MASKED)
    weights = probabilities
    if kept is not None:
        weights = tl.where(kept, probabilities, 0.0)
        grad_products = tl.where(kept, grad_products * rule.dropout_scale, 0.0)
    grad_scores = probabilities * (grad_products - delta) * slope_of_softcap
    return weights, scores, where_seen(grad_scores, scores, rule, MASKED)


@dataclass(frozen=True)
class BackwardInputs:
    """What both of the large kernels read: the forward's inputs, and [B, H, T, Dv] and twice [B, H, T] more."""

    forward: AttentionInputs
    grad_output: torch.Tensor
    exponent: torch.Tensor
    delta: torch.Tensor

    def arguments(self, tiles: AttentionTiles) -> dict[str, Any]:
        """The arguments that both kernels have."""
        forward = self.forward
        return {
            **forward.arguments(tiles),
            "grad_output": heads(self.grad_output),
            "exponent": self.exponent,
            "delta": self.delta,
            "ADDRESSES": addresses(
                tiles.products,
                *((tiles.block_m, tensor) for tensor in (forward.query, self.grad_output)),
                *((tiles.block_n, tensor) for tensor in (forward.key, forward.value)),
            ),
            "ALIGNMENT": alignment_of(self.grad_output, forward.query, forward.key, forward.value),
        }


def attention_backward_rows_call(
    output: torch.Tensor, logsumexp: torch.Tensor, inputs: BackwardInputs, rows: RowTiles
) -> Call:
    """The launch that fills `exponent` and `delta` of `inputs`."""
    batch, head_count, q_len, value_dim = output.shape
    return Call(
        kernel=attention_backward_rows_kernel,
        grid=(batch * head_count * triton.cdiv(q_len, rows.block_m),),
        arguments={
            "grad_output": heads(inputs.grad_output),
            "output": heads(output),
            "logsumexp": logsumexp,
            "exponent": inputs.exponent,
            "delta": inputs.delta,
            # What a mask adds may be the least float32 there is: in units of log2 it would be infinite.
            "unit": LOG2_E if inputs.forward.options.mask is None else 1.0,
            "head_count": head_count,
            "q_len": q_len,
            "VALUE_DIM": value_dim,
            "ALIGNMENT": alignment_of(inputs.grad_output, output),
            "BLOCK_M": rows.block_m,
            "BLOCK_DV": padded(value_dim),
        },
        options={"num_warps": rows.num_warps},
    )
