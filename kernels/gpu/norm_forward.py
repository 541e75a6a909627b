"""Layer norm and RMS norm, forward, alone or with the residual add and its dropout: one read, one write.

Programs are persistent: each walks over rows, so that weight and bias are read once and a new number of rows needs no
new compilation. Rows too wide for a program's registers go by in chunks, which a second pass finds in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .call import Call, alignment_of, strides
from .dropout import dropout_factors
from .norm_launch import NormTiles
from .tile import aligned

# Triton takes an argument named `stream` for its own, so that the kernels' must be named otherwise.
NOT_SPECIALIZED = ["residual_stream_stride_m", "branch_stride_m", "rows", "dropout_threshold"]


@triton.jit
def load_summed(
    residual_stream: tl.tensor,  # one row
    branch: tl.tensor,  # one row, or None
    seed: tl.tensor,  # [1] int64, or None
    residual_stream_stride_n: tl.tensor,
    branch_stride_n: tl.tensor,
    row: tl.tensor,
    first_column: tl.tensor,
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """BLOCK_N columns of residual_stream + dropout(branch), rounded to their dtype; past the end 0."""
    columns = first_column + tl.arange(0, BLOCK_N)
    mask = columns < WIDTH
    columns = columns.to(tl.int64)
    summed = tl.load(residual_stream + columns * residual_stream_stride_n, mask=mask, other=0.0)
    if branch is not None:
        added = tl.load(branch + columns * branch_stride_n, mask=mask, other=0.0).to(tl.float32)
        if seed is not None:
            rows = tl.full([1, 1], 0, tl.int32) + row
            factors = dropout_factors(seed, rows, first_column, dropout_threshold, dropout_scale, BLOCK_N)
            added *= tl.reshape(factors, [BLOCK_N])
        summed = (summed.to(tl.float32) + added).to(summed.dtype)
    return summed


@triton.jit
def scaled(
    unit: tl.tensor,  # [BLOCK_N] float32
    weight_row: tl.tensor,  # [BLOCK_N], or None
    bias_row: tl.tensor,
) -> tl.tensor:
    """Unit * weight + bias."""
    if weight_row is not None:
        unit = unit * weight_row
    if bias_row is not None:
        unit = unit + bias_row
    return unit


@triton.jit
def load_parameter(
    parameter: tl.tensor,  # [N], or None
    columns: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Columns of weight or bias in float32, or None."""
    loaded = parameter
    if parameter is not None:
        loaded = tl.load(parameter + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return loaded


# Memory: stream (and branch) in, normalized (and the sum) out, 4 or 8 bytes of statistics a row. A row stays in
# registers between statistics and result.
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_forward_kernel(
    residual_stream: tl.tensor,  # [M, N]
    branch: tl.tensor,  # [M, N], or None
    weight: tl.tensor,  # [N], or None
    bias: tl.tensor,  # [N], or None
    seed: tl.tensor,  # [1] int64, or None without dropout
    normalized: tl.tensor,  # [M, N], contiguous
    summed: tl.tensor,  # [M, N], contiguous, or None without branch
    mean: tl.tensor,  # [M] float32, or None for RMS norm
    rstd: tl.tensor,  # [M] float32
    residual_stream_stride_m: tl.tensor,
    residual_stream_stride_n: tl.tensor,
    branch_stride_m: tl.tensor,
    branch_stride_n: tl.tensor,
    rows: tl.tensor,  # M
    eps: tl.tensor,
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    WIDTH: tl.constexpr,  # N
    ALIGNMENT: tl.constexpr,  # elements; the row strides are multiples of it
    BLOCK_N: tl.constexpr,  # at least N
) -> None:
    """Normalize rows, a whole one at a time."""
    columns = tl.arange(0, BLOCK_N)
    mask = columns < WIDTH
    weight_row = load_parameter(weight, columns, WIDTH)
    bias_row = load_parameter(bias, columns, WIDTH)
    residual_stream_stride_m = aligned(residual_stream_stride_m, ALIGNMENT)
    branch_stride_m = aligned(branch_stride_m, ALIGNMENT)
    width = tl.full([], WIDTH, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        x = load_summed(
            residual_stream + row * residual_stream_stride_m,
            branch if branch is None else branch + row * branch_stride_m, seed,
            residual_stream_stride_n, branch_stride_n, row, 0, dropout_threshold, dropout_scale, WIDTH, BLOCK_N,
        )  # fmt: skip
        if summed is not None:
            tl.store(summed + row * width + columns, x, mask=mask)
        x = x.to(tl.float32)
        if mean is not None:
            row_mean = tl.sum(x, 0) / WIDTH
            x = tl.where(mask, x - row_mean, 0.0)
            # What rounding left in the mean is taken out as well: rows far from 0 keep their small variance.
            remainder = tl.sum(x, 0) / WIDTH
            x = tl.where(mask, x - remainder, 0.0)
            tl.store(mean + row, row_mean + remainder)
        row_rstd = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        tl.store(rstd + row, row_rstd)
        result = scaled(x * row_rstd, weight_row, bias_row)
        tl.store(normalized + row * width + columns, result.to(normalized.dtype.element_ty), mask=mask)


# Memory: as above; the second reading of a row comes from L2 (a row of 65,536 float32 is 256 KiB).
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_forward_wide_kernel(
    residual_stream: tl.tensor,  # [M, N]
    branch: tl.tensor,  # [M, N], or None
    weight: tl.tensor,  # [N], or None
    bias: tl.tensor,  # [N], or None
    seed: tl.tensor,  # [1] int64, or None without dropout
    normalized: tl.tensor,  # [M, N], contiguous
    summed: tl.tensor,  # [M, N], contiguous, or None without branch
    mean: tl.tensor,  # [M] float32, or None for RMS norm
    rstd: tl.tensor,  # [M] float32
    residual_stream_stride_m: tl.tensor,
    residual_stream_stride_n: tl.tensor,
    branch_stride_m: tl.tensor,
    branch_stride_n: tl.tensor,
    rows: tl.tensor,  # M
    eps: tl.tensor,
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    WIDTH: tl.constexpr,  # N
    ALIGNMENT: tl.constexpr,  # elements; the row strides are multiples of it
    BLOCK_N: tl.constexpr,  # a chunk
) -> None:
    """Normalize rows, each in two passes of chunks; chunks' statistics merge as in Chan, Golub and LeVeque (1983)."""
    residual_stream_stride_m = aligned(residual_stream_stride_m, ALIGNMENT)
    branch_stride_m = aligned(branch_stride_m, ALIGNMENT)
    width = tl.full([], WIDTH, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        residual_stream_row = residual_stream + row * residual_stream_stride_m
        branch_row = branch if branch is None else branch + row * branch_stride_m
        row_mean = tl.full([], 0.0, tl.float32)
        squares = tl.full([], 0.0, tl.float32)  # of the deviations from row_mean
        for first_column in tl.range(0, WIDTH, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)
            x = load_summed(
                residual_stream_row, branch_row, seed, residual_stream_stride_n, branch_stride_n,
                row, first_column, dropout_threshold, dropout_scale, WIDTH, BLOCK_N,
            )  # fmt: skip
            if summed is not None:
                tl.store(summed + row * width + columns, x, mask=columns < WIDTH)
            x = x.to(tl.float32)
            if mean is not None:
                count = tl.minimum(WIDTH - first_column, BLOCK_N)
                chunk_mean = tl.sum(x, 0) / count
                x = tl.where(columns < WIDTH, x - chunk_mean, 0.0)
                distance = chunk_mean - row_mean
                share = count.to(tl.float32) / (first_column + count)
                row_mean += distance * share
                squares += distance * distance * share * first_column
            squares += tl.sum(x * x, 0)
        row_rstd = tl.rsqrt(squares / WIDTH + eps)
        if mean is not None:
            tl.store(mean + row, row_mean)
        tl.store(rstd + row, row_rstd)
        for first_column in tl.range(0, WIDTH, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)
            x = load_summed(
                residual_stream_row, branch_row, seed, residual_stream_stride_n, branch_stride_n,
                row, first_column, dropout_threshold, dropout_scale, WIDTH, BLOCK_N,
            ).to(tl.float32)  # fmt: skip
            if mean is not None:
                x -= row_mean
            result = scaled(x * row_rstd, load_parameter(weight, columns, WIDTH), load_parameter(bias, columns, WIDTH))
            result = result.to(normalized.dtype.element_ty)
            tl.store(normalized + row * width + columns, result, mask=columns < WIDTH)


@dataclass(frozen=True)
class Dropout:
    """Which elements are dropped: those whose random word is below `probability` of 2^32."""

    seed: torch.Tensor | None
    probability: float

    def arguments(self) -> dict[str, Any]:
        """As the kernels name them; without a seed nothing is dropped."""
        return {
            "seed": self.seed,
            "dropout_threshold": min(round(self.probability * 2**32), 2**32 - 1),
            "dropout_scale": 1.0 / (1.0 - self.probability) if self.probability < 1.0 else 0.0,
        }


@dataclass(frozen=True)
class NormResults:
    """What a forward fills: [M, N] twice and [M] twice, all contiguous; None is not wanted."""

    normalized: torch.Tensor
    summed: torch.Tensor | None
    mean: torch.Tensor | None
    rstd: torch.Tensor


def norm_forward_call(
    stream: torch.Tensor,
    branch: torch.Tensor | None,
    parameters: tuple[torch.Tensor | None, torch.Tensor | None],
    dropout: Dropout,
    eps: float,
    results: NormResults,
    tiles: NormTiles,
) -> Call:
    """The launch that normalizes the rows of `stream` + dropout(`branch`), both [M, N]; `parameters` are [N]."""
    rows, width = stream.shape
    read = (stream,) if branch is None else (stream, branch)
    return Call(
        kernel=norm_forward_kernel if width <= tiles.block_n else norm_forward_wide_kernel,
        grid=(tiles.programs_of(rows),),
        arguments={
            "residual_stream": stream,
            "branch": branch,
            "weight": parameters[0],
            "bias": parameters[1],
            "normalized": results.normalized,
            "summed": results.summed,
            "mean": results.mean,
            "rstd": results.rstd,
            **strides("residual_stream", stream, "mn"),
            **strides("branch", stream if branch is None else branch, "mn"),
            **dropout.arguments(),
            "rows": rows,
            "eps": eps,
            "WIDTH": width,
            "ALIGNMENT": alignment_of(*read),
            "BLOCK_N": tiles.block_n,
        },
        options={"num_warps": tiles.num_warps},
    )
