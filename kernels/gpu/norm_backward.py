"""Layer norm and RMS norm, backward: persistent programs that sum the weights' gradients in registers, then a last sum.

Every program adds up what its rows contribute to the gradients of weight and bias, in float32, and writes one partial
row; a second kernel sums those. No locks and no atomics: the same inputs give the same bits. Partial rows are bytes, so
that a program has as many warps as hide the memory's latency, on several rows at once where rows are short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .call import Call, alignment_of, strides
from .dropout import dropout_factors
from .norm_forward import Dropout, load_parameter
from .norm_launch import NormTiles
from .tile import aligned

NOT_SPECIALIZED = ["grad_normalized_stride_m", "grad_summed_stride_m", "summed_stride_m", "rows", "dropout_threshold"]


@triton.jit
def unit_and_gradient(
    grad_normalized: tl.tensor,  # one row, or [BLOCK_M, 1] of them
    summed: tl.tensor,  # likewise
    grad_normalized_stride_n: tl.tensor,
    summed_stride_n: tl.tensor,
    row_mean: tl.tensor,  # of each row, or None for RMS norm
    row_rstd: tl.tensor,
    columns: tl.tensor,  # [BLOCK_N], of several rows [1, BLOCK_N]
    mask: tl.tensor,  # what is there
) -> tuple[tl.tensor, tl.tensor]:
    """(summed - mean) * rstd and the gradient of the normalized rows, in float32; 0 where `mask` is false."""
    columns = columns.to(tl.int64)
    gradient = tl.load(grad_normalized + columns * grad_normalized_stride_n, mask=mask, other=0.0).to(tl.float32)
    unit = tl.load(summed + columns * summed_stride_n, mask=mask, other=0.0).to(tl.float32)
    if row_mean is not None:
        unit = tl.where(mask, unit - row_mean, 0.0)
    return unit * row_rstd, gradient


@triton.jit
def store_gradients(
    grad_stream: tl.tensor,  # [BLOCK_M, 1] rows
    grad_branch: tl.tensor,  # likewise, or None without dropout
    grad_summed: tl.tensor,  # likewise, or None
    grad_summed_stride_n: tl.tensor,
    seed: tl.tensor,
    gradient: tl.tensor,  # [BLOCK_M, BLOCK_N] float32, without that of the sum
    row: tl.tensor,  # [BLOCK_M, 1]
    first_column: tl.tensor,
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    mask: tl.tensor,  # what is there
) -> None:
    """Add the gradient of the sum, and hand it to the stream and, dropped again, to the branch."""
    BLOCK_N: tl.constexpr = gradient.shape[1]
    columns = first_column + tl.arange(0, BLOCK_N)[None, :]
    if grad_summed is not None:
        wide_columns = columns.to(tl.int64)
        gradient += tl.load(grad_summed + wide_columns * grad_summed_stride_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_stream + columns, gradient.to(grad_stream.dtype.element_ty), mask=mask)
    if grad_branch is not None:
        gradient *= dropout_factors(seed, row, first_column, dropout_threshold, dropout_scale, BLOCK_N)
        tl.store(grad_branch + columns, gradient.to(grad_branch.dtype.element_ty), mask=mask)


# Memory: grad_normalized, summed (and grad_summed) in, grad_stream (and grad_branch) out, and for every program the
# weight's row in and 4 or 8 bytes a column out, which the last sum reads. 4096 bfloat16 rows of 1024 on 132 processors:
# 25.2 MB of rows and 1.3 of programs, layer norm's.
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_backward_kernel(
    grad_normalized: tl.tensor,  # [M, N]
    grad_summed: tl.tensor,  # [M, N], or None
    summed: tl.tensor,  # [M, N]
    mean: tl.tensor,  # [M] float32, or None for RMS norm
    rstd: tl.tensor,  # [M] float32
    weight: tl.tensor,  # [N], or None
    seed: tl.tensor,  # [1] int64, or None without dropout
    grad_stream: tl.tensor,  # [M, N], contiguous
    grad_branch: tl.tensor,  # [M, N], contiguous, or None without dropout
    weight_parts: tl.tensor,  # [programs, N] float32, or None
    bias_parts: tl.tensor,  # [programs, N] float32, or None
    grad_normalized_stride_m: tl.tensor,
    grad_normalized_stride_n: tl.tensor,
    grad_summed_stride_m: tl.tensor,
    grad_summed_stride_n: tl.tensor,
    summed_stride_m: tl.tensor,
    summed_stride_n: tl.tensor,
    rows: tl.tensor,  # M
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    WIDTH: tl.constexpr,  # N
    ALIGNMENT: tl.constexpr,  # elements; the row strides are multiples of it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
) -> None:
    """The gradients of rows, BLOCK_M whole ones at a time, and this program's part of the weights'."""
    columns = tl.arange(0, BLOCK_N)[None, :]
    weight_row = load_parameter(weight, columns, WIDTH)
    grad_weight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    grad_normalized_stride_m = aligned(grad_normalized_stride_m, ALIGNMENT)
    grad_summed_stride_m = aligned(grad_summed_stride_m, ALIGNMENT)
    summed_stride_m = aligned(summed_stride_m, ALIGNMENT)
    width = tl.full([], WIDTH, tl.int64)
    for first_row in tl.range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)[:, None]
        mask = (row < rows) & (columns < WIDTH)
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
        unit, gradient = unit_and_gradient(
            grad_normalized + row * grad_normalized_stride_m, summed + row * summed_stride_m,
            grad_normalized_stride_n, summed_stride_n,
            mean if mean is None else tl.load(mean + row, mask=row < rows, other=0.0), row_rstd, columns, mask,
        )  # fmt: skip
        if weight_parts is not None:
            grad_weight += gradient * unit
        if bias_parts is not None:
            grad_bias += gradient
        if weight_row is not None:
            gradient *= weight_row
        grad_input = gradient - unit * (tl.sum(gradient * unit, 1, keep_dims=True) / WIDTH)
        if mean is not None:
            grad_input -= tl.sum(gradient, 1, keep_dims=True) / WIDTH
        store_gradients(
            grad_stream + row * width, grad_branch if grad_branch is None else grad_branch + row * width,
            grad_summed if grad_summed is None else grad_summed + row * grad_summed_stride_m, grad_summed_stride_n,
            seed, grad_input * row_rstd, row, 0, dropout_threshold, dropout_scale, mask,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    part = tl.program_id(0) * width + columns
    if weight_parts is not None:
        tl.store(weight_parts + part, tl.sum(grad_weight, 0), mask=columns < WIDTH)
    if bias_parts is not None:
        tl.store(bias_parts + part, tl.sum(grad_bias, 0), mask=columns < WIDTH)


# Memory: as above, the second reading of a row from L2; the weights' gradients are another kernel's.
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_backward_wide_kernel(
    grad_normalized: tl.tensor,  # [M, N]
    grad_summed: tl.tensor,  # [M, N], or None
    summed: tl.tensor,  # [M, N]
    mean: tl.tensor,  # [M] float32, or None for RMS norm
    rstd: tl.tensor,  # [M] float32
    weight: tl.tensor,  # [N], or None
    seed: tl.tensor,  # [1] int64, or None without dropout
    grad_stream: tl.tensor,  # [M, N], contiguous
    grad_branch: tl.tensor,  # [M, N], contiguous, or None without dropout
    grad_normalized_stride_m: tl.tensor,
    grad_normalized_stride_n: tl.tensor,
    grad_summed_stride_m: tl.tensor,
    grad_summed_stride_n: tl.tensor,
    summed_stride_m: tl.tensor,
    summed_stride_n: tl.tensor,
    rows: tl.tensor,  # M
    dropout_threshold: tl.tensor,
    dropout_scale: tl.tensor,
    WIDTH: tl.constexpr,  # N
    ALIGNMENT: tl.constexpr,  # elements; the row strides are multiples of it
    BLOCK_N: tl.constexpr,  # a chunk
) -> None:
    """The gradients of rows, each in two passes of chunks: the sums along the row, then the row."""
    grad_normalized_stride_m = aligned(grad_normalized_stride_m, ALIGNMENT)
    grad_summed_stride_m = aligned(grad_summed_stride_m, ALIGNMENT)
    summed_stride_m = aligned(summed_stride_m, ALIGNMENT)
    width = tl.full([], WIDTH, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row_rstd = tl.load(rstd + row)
        row_mean = mean if mean is None else tl.load(mean + row)
        grad_normalized_row = grad_normalized + row * grad_normalized_stride_m
        summed_row = summed + row * summed_stride_m
        projection = tl.full([], 0.0, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for first_column in tl.range(0, WIDTH, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)[None, :]
            unit, gradient = unit_and_gradient(
                grad_normalized_row, summed_row, grad_normalized_stride_n, summed_stride_n,
                row_mean, row_rstd, columns, columns < WIDTH,
            )  # fmt: skip
            if weight is not None:
                gradient *= load_parameter(weight, columns, WIDTH)
            projection += tl.sum(gradient * unit)
            total += tl.sum(gradient)
        for first_column in tl.range(0, WIDTH, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)[None, :]
            unit, gradient = unit_and_gradient(
                grad_normalized_row, summed_row, grad_normalized_stride_n, summed_stride_n,
                row_mean, row_rstd, columns, columns < WIDTH,
            )  # fmt: skip
            if weight is not None:
                gradient *= load_parameter(weight, columns, WIDTH)
            grad_input = gradient - unit * (projection / WIDTH)
            if mean is not None:
                grad_input -= total / WIDTH
            store_gradients(
                grad_stream + row * width, grad_branch if grad_branch is None else grad_branch + row * width,
                grad_summed if grad_summed is None else grad_summed + row * grad_summed_stride_m,
                grad_summed_stride_n, seed, grad_input * row_rstd,
                tl.full([1, 1], 0, tl.int32) + row, first_column, dropout_threshold, dropout_scale, columns < WIDTH,
            )  # fmt: skip


# Memory: grad_normalized and summed in once more, for rows so wide that one program cannot sum all their columns.
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def norm_backward_parts_kernel(
    grad_normalized: tl.tensor,  # [M, N]
    summed: tl.tensor,  # [M, N]
    mean: tl.tensor,  # [M] float32, or None for RMS norm
    rstd: tl.tensor,  # [M] float32
    weight_parts: tl.tensor,  # [programs, N] float32, or None
    bias_parts: tl.tensor,  # [programs, N] float32, or None
    grad_normalized_stride_m: tl.tensor,
    grad_normalized_stride_n: tl.tensor,
    summed_stride_m: tl.tensor,
    summed_stride_n: tl.tensor,
    rows: tl.tensor,  # M
    WIDTH: tl.constexpr,  # N
    ALIGNMENT: tl.constexpr,  # elements; the row strides are multiples of it
    BLOCK_N: tl.constexpr,
) -> None:
    """One program's part of the weights' gradients, for BLOCK_N columns of its rows."""
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_weight = tl.zeros([BLOCK_N], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        unit, gradient = unit_and_gradient(
            grad_normalized + row * aligned(grad_normalized_stride_m, ALIGNMENT),
            summed + row * aligned(summed_stride_m, ALIGNMENT), grad_normalized_stride_n, summed_stride_n,
            mean if mean is None else tl.load(mean + row), tl.load(rstd + row), columns,
            columns < WIDTH,
        )  # fmt: skip
        grad_weight += gradient * unit
        grad_bias += gradient
    part = tl.program_id(0) * tl.full([], WIDTH, tl.int64) + columns
    if weight_parts is not None:
        tl.store(weight_parts + part, grad_weight, mask=columns < WIDTH)
    if bias_parts is not None:
        tl.store(bias_parts + part, grad_bias, mask=columns < WIDTH)


# Memory: the parts in, 4 bytes a column and program; small against the rows unless those are few.
@triton.jit(do_not_specialize=["programs"])
def column_sums_kernel(
    parts: tl.tensor,  # [2, programs, N] float32: the weights' and the bias's
    grad_weight: tl.tensor,  # [N], or None
    grad_bias: tl.tensor,  # [N], or None
    programs: tl.tensor,
    WIDTH: tl.constexpr,  # N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Sum parts over programs, in an order that their number alone decides: (i, 0) the weights', (i, 1) the bias's.

    One launch for both: a second one takes the processor longer than this takes the GPU.
    """
    half = tl.program_id(1)
    parts += half * programs * tl.full([], WIDTH, tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_row in tl.range(0, programs, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < programs) & (columns < WIDTH)
        sums += tl.load(parts + rows * WIDTH + columns, mask=mask, other=0.0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.sum(sums, 0)
    if grad_weight is not None:
        tl.store(
            grad_weight + columns, total.to(grad_weight.dtype.element_ty), mask=columns < tl.where(half == 0, WIDTH, 0)
        )
    if grad_bias is not None:
        tl.store(
            grad_bias + columns, total.to(grad_bias.dtype.element_ty), mask=columns < tl.where(half == 1, WIDTH, 0)
        )


@dataclass(frozen=True)
class NormGradients:
    """What a backward fills: [M, N] twice, contiguous, and the weights' parts; None is not wanted."""

    grad_stream: torch.Tensor
    grad_branch: torch.Tensor | None
    weight_parts: torch.Tensor | None
    bias_parts: torch.Tensor | None


@dataclass(frozen=True)
class NormInputs:
    """What a backward reads: [M, N] three times, [M] twice and [N]; None is absent."""

    grad_normalized: torch.Tensor
    grad_summed: torch.Tensor | None
    summed: torch.Tensor
    mean: torch.Tensor | None
    rstd: torch.Tensor
    weight: torch.Tensor | None


def norm_backward_calls(inputs: NormInputs, gradients: NormGradients, dropout: Dropout, tiles: NormTiles) -> list[Call]:
    """The launches that fill `gradients`: one, or for rows wider than `tiles.block_n` two."""
    rows, width = inputs.summed.shape
    grad_summed = inputs.summed if inputs.grad_summed is None else inputs.grad_summed
    shared = {
        "grad_normalized": inputs.grad_normalized,
        "summed": inputs.summed,
        "mean": inputs.mean,
        "rstd": inputs.rstd,
        **strides("grad_normalized", inputs.grad_normalized, "mn"),
        **strides("summed", inputs.summed, "mn"),
        "rows": rows,
        "WIDTH": width,
        "ALIGNMENT": alignment_of(inputs.grad_normalized, inputs.summed, grad_summed),
        "BLOCK_N": tiles.block_n,
    }
    parts = {"weight_parts": gradients.weight_parts, "bias_parts": gradients.bias_parts}
    rows_only = {
        "grad_summed": inputs.grad_summed,
        "weight": inputs.weight,
        "grad_stream": gradients.grad_stream,
        "grad_branch": gradients.grad_branch,
        **strides("grad_summed", grad_summed, "mn"),
        **dropout.arguments(),
    }
    options = {"num_warps": tiles.num_warps}
    if width <= tiles.block_n:
        arguments = {**shared, **rows_only, **parts, "BLOCK_M": tiles.block_m}
        return [Call(norm_backward_kernel, (parts_of(rows, width, tiles),), arguments, options)]
    calls = [Call(norm_backward_wide_kernel, (tiles.programs_of(rows),), {**shared, **rows_only}, options)]
    if any(part is not None for part in parts.values()):
        grid = (parts_of(rows, width, tiles), triton.cdiv(width, tiles.block_n))
        calls.append(Call(norm_backward_parts_kernel, grid, {**shared, **parts}, options))
    return calls


def parts_of(rows: int, width: int, tiles: NormTiles) -> int:
    """How many partial rows of the weights' gradients a backward writes."""
    return tiles.programs_of(rows, chunks=triton.cdiv(width, tiles.block_n))


def column_sums_call(parts: torch.Tensor, grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None) -> Call:
    """The launch that sums `parts` [2, programs, N] into `grad_weight` and `grad_bias` [N]; one may be absent."""
    _, programs, width = parts.shape
    # 32 bytes of a row are the least that memory hands out, 64 columns are 256: with 16 rows 8 elements a thread, or 4,
    # one access, where 64 threads are a warp.
    block_m, block_n = 16, 64
    return Call(
        kernel=column_sums_kernel,
        grid=(triton.cdiv(width, block_n), 2),
        arguments={
            "parts": parts,
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
            "programs": programs,
            "WIDTH": width,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        options={"num_warps": 4},
    )
