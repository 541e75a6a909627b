"""Causal-softmax attention, backward: three kernels without atomics, so that the same inputs give the same bits.

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

from .attention_launch import AttentionTiles, RowTiles
from .call import Call, alignment_of, padded, strides
from .tile import aligned


# Memory: grad_output and output once; 4 bytes in and 8 out for every row of Dv.
@triton.jit(
    do_not_specialize=[
        "grad_output_stride_b", "grad_output_stride_h", "grad_output_stride_t",
        "output_stride_b", "output_stride_h", "output_stride_t",
        "heads", "q_len",
    ]
)  # fmt: skip
def attention_backward_rows_kernel(
    grad_output: tl.tensor,  # [B, H, T, Dv]
    output: tl.tensor,  # [B, H, T, Dv]
    logsumexp: tl.tensor,  # [B, H, T] float32, contiguous
    exponent: tl.tensor,  # [B, H, T] float32, contiguous
    delta: tl.tensor,  # [B, H, T] float32, contiguous
    grad_output_stride_b: tl.tensor,
    grad_output_stride_h: tl.tensor,
    grad_output_stride_t: tl.tensor,
    grad_output_stride_d: tl.tensor,
    output_stride_b: tl.tensor,
    output_stride_h: tl.tensor,
    output_stride_t: tl.tensor,
    output_stride_d: tl.tensor,
    heads: tl.tensor,  # H
    q_len: tl.tensor,  # T
    VALUE_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # elements; every stride but the last is a multiple of it
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """What every score of a row needs in the backward pass, once a row instead of once a score.

    exponent: what exp2 subtracts from scaled scores to make probabilities of them, logsumexp in units of log2; of a
    row that saw no key it is infinite, which makes the probabilities 0. delta: the sum of grad_output * output.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    grad_output += batch * aligned(grad_output_stride_b, ALIGNMENT) + head * aligned(grad_output_stride_h, ALIGNMENT)
    output += batch * aligned(output_stride_b, ALIGNMENT) + head * aligned(output_stride_h, ALIGNMENT)

    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offsets = rows.to(tl.int64)[:, None]
    value_dims = tl.arange(0, BLOCK_DV).to(tl.int64)[None, :]
    mask = (rows[:, None] < q_len) & (value_dims < VALUE_DIM)
    grad_output += row_offsets * aligned(grad_output_stride_t, ALIGNMENT) + value_dims * grad_output_stride_d
    output += row_offsets * aligned(output_stride_t, ALIGNMENT) + value_dims * output_stride_d
    product = tl.load(grad_output, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(output, mask=mask, other=0.0).to(tl.float32)
    statistics = (batch * heads + head) * q_len + rows
    row_logsumexp = tl.load(logsumexp + statistics, mask=rows < q_len, other=0.0)
    row_exponent = tl.where(row_logsumexp == float("-inf"), float("inf"), row_logsumexp * LOG2_E)
    tl.store(exponent + statistics, row_exponent, mask=rows < q_len)
    tl.store(delta + statistics, tl.sum(product, 1), mask=rows < q_len)


def attention_backward_rows_call(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    exponent: torch.Tensor,
    delta: torch.Tensor,
    rows: RowTiles,
) -> Call:
    """The launch that fills `exponent` and `delta`, both [B, H, T] float32."""
    batch, heads, q_len, value_dim = output.shape
    return Call(
        kernel=attention_backward_rows_kernel,
        grid=(batch * heads * triton.cdiv(q_len, rows.block_m),),
        arguments={
            "grad_output": grad_output,
            "output": output,
            "logsumexp": logsumexp,
            "exponent": exponent,
            "delta": delta,
            **strides("grad_output", grad_output, "bhtd"),
            **strides("output", output, "bhtd"),
            "heads": heads,
            "q_len": q_len,
            "VALUE_DIM": value_dim,
            "ALIGNMENT": alignment_of(grad_output, output),
            "BLOCK_M": rows.block_m,
            "BLOCK_DV": padded(value_dim),
        },
        options={"num_warps": rows.num_warps},
    )


@dataclass(frozen=True)
class BackwardInputs:
    """What both of the large kernels read: [B, H, T, ...] and [B, Hkv, S, ...] as in `attention_backward`."""

    grad_output: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    exponent: torch.Tensor
    delta: torch.Tensor
    is_causal: bool
    scale: float
    precision: str

    def arguments(self, tiles: AttentionTiles) -> dict[str, Any]:
        """The arguments that both kernels have, but for what tells whether offsets are wide."""
        heads, q_len, head_dim = self.query.shape[1:]
        kv_heads, kv_len, value_dim = self.value.shape[1:]
        return {
            "grad_output": self.grad_output,
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "exponent": self.exponent,
            "delta": self.delta,
            **strides("grad_output", self.grad_output, "bhtd"),
            **strides("query", self.query, "bhtd"),
            **strides("key", self.key, "bhtd"),
            **strides("value", self.value, "bhtd"),
            "heads": heads,
            "group": heads // max(kv_heads, 1),
            "q_len": q_len,
            "kv_len": kv_len,
            "scale": self.scale,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ALIGNMENT": alignment_of(self.grad_output, self.query, self.key, self.value),
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(value_dim),
            "IS_CAUSAL": self.is_causal,
            "PRECISION": self.precision,
        }
