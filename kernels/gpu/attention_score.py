"""From the product of a query and a key to their score: the one place that says what a score is.

The forward, both backward kernels and the decode kernel call `score`; two of them with queries down and keys across,
one the other way around: numbers of queries and keys come as tensors that broadcast, [M, 1] and [1, N] or [1, M] and
[N, 1]. What a call does not ask for is None in its rule, known to the compiler, and costs nothing.

Only arguments can be None: before triton 3.7 a function cannot return a tuple that holds it. What is made of an absent
part of a rule is therefore 0, and the rule is asked whether it counts.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import Heads, stride_of

# Keys in a tile when they are guarded (`weigh`): the fewest there can be fit the registers that larger tiles left.
GUARD_BLOCK = tl.constexpr(16)


class Slopes(NamedTuple):
    """The slopes of ALiBi, [B or N, H] float32, with their strides."""

    pointer: tl.tensor
    stride_n: tl.tensor
    stride_h: tl.tensor


class Rule(NamedTuple):
    """What is done to the product of query i and key j of a sequence, in this order; None: not done."""

    scale: tl.tensor  # s = product * scale
    is_negative: tl.tensor | None  # the scale is
    softcap: tl.tensor | None  # s = softcap * tanh(s / softcap)
    alibi_slopes: Slopes | None  # s -= slope * |i + offset - j|
    mask: Heads | None  # bool: hidden where false; else s += mask
    lower_right: tl.tensor | None  # offset = keys - queries of the sequence; otherwise 0
    window_left: tl.tensor | None  # hidden where j < i + offset - window_left
    window_right: tl.tensor | None  # hidden where j > i + offset + window_right
    seed: tl.tensor | None  # [1] int64: dropout of the probabilities
    dropout_threshold: tl.tensor | None  # of 2^16: random numbers below it drop
    dropout_scale: tl.tensor | None  # what is kept is multiplied by it


class Band(NamedTuple):
    """Which keys of a sequence are in the window of its query i: those with i + first <= j <= i + last."""

    first: tl.tensor  # if there is a window_left
    last: tl.tensor  # if there is a window_right
    offset: tl.tensor
    queries: tl.tensor
    keys: tl.tensor  # that exist


class Scoring(NamedTuple):
    """A rule, made ready for one head of one sequence, or for another head in every row."""

    scale: tl.tensor  # not negative: the tile that a program keeps carries the sign (`signed`)
    slope: tl.tensor  # if there are slopes
    mask: tl.tensor  # at query 0 and key 0, if there is one
    mask_stride_t: tl.tensor
    band: Band


@triton.jit
def band_of(rule: Rule, queries: tl.tensor, keys: tl.tensor) -> Band:
    """The window of a sequence of so many queries and keys."""
    offset = keys * 0
    first = offset
    last = offset
    if rule.lower_right is not None:
        offset = keys - queries
    if rule.window_left is not None:
        first = offset - rule.window_left
    if rule.window_right is not None:
        last = offset + rule.window_right
    return Band(first, last, offset, queries, keys)


@triton.jit
def scoring_of(rule: Rule, sequence: tl.tensor, head: tl.tensor, band: Band, MASK_ALIGNMENT: tl.constexpr) -> Scoring:
    """The rule for a head, or for the heads [M, 1] of rows, of a sequence."""
    slope = 0.0
    mask = 0
    mask_stride_t = 0
    if rule.alibi_slopes is not None:
        slopes = rule.alibi_slopes
        slope = tl.load(slopes.pointer + sequence * slopes.stride_n + head * slopes.stride_h)
    if rule.mask is not None:
        mask = rule.mask.pointer + sequence * stride_of(rule.mask.stride_b, MASK_ALIGNMENT)
        mask += head * stride_of(rule.mask.stride_h, MASK_ALIGNMENT)
        mask_stride_t = stride_of(rule.mask.stride_t, MASK_ALIGNMENT)
    return Scoring(tl.abs(rule.scale), slope, mask, mask_stride_t, band)


@triton.jit
def signed(tile: tl.tensor, rule: Rule) -> tl.tensor:
    """The tile, negated if the scale is negative: then the largest scaled score is the scaled largest score.

    Otherwise left as it was loaded, which lets tensor cores read it from shared memory instead of from registers.
    """
    if rule.is_negative is not None:
        tile = -tile
    return tile


@triton.jit
def is_plain(rule: Rule) -> tl.constexpr:
    """Whether scores are products but for the scale, so that it can be part of the exponent."""
    return rule.softcap is None and rule.alibi_slopes is None and rule.mask is None


@triton.jit
def unit_of(rule: Rule, scoring: Scoring) -> tl.tensor:
    """What `score` must be multiplied by: plain scores are left unscaled, which saves a multiplication each."""
    unit = 1.0
    if is_plain(rule):
        # Of a scale of 0 so much is left that products become 0, and -inf stays what it is.
        unit = tl.maximum(scoring.scale, 1e-37)
    return unit


@triton.jit
def score(
    products: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    rule: Rule,
    scoring: Scoring,
    MASKED: tl.constexpr,  # some pair of the tile is outside of the window, or some key does not exist
) -> tuple[tl.tensor, tl.tensor]:
    """The scores, in units of `unit_of`, -inf where hidden; and what softcap multiplies their gradient by."""
    scores = products
    slope_of_softcap = 1.0
    if rule.softcap is not None:
        capped = tanh(products * (scoring.scale / rule.softcap))
        slope_of_softcap = 1.0 - capped * capped
        scores = capped * rule.softcap
    elif not is_plain(rule):
        scores = products * scoring.scale
    if rule.alibi_slopes is not None:
        # Exact up to 2^24 tokens. Subtracted as floats, which takes one conversion a row instead of one a score.
        distance = (queries + scoring.band.offset).to(tl.float32) - keys.to(tl.float32)
        scores -= scoring.slope * tl.abs(distance)
    if rule.mask is not None:
        pointers = scoring.mask + queries * scoring.mask_stride_t + keys * rule.mask.stride_d
        exists = queries < scoring.band.queries
        if MASKED:  # otherwise all keys exist, and many entries of a row are loaded at once
            exists = exists & (keys < scoring.band.keys)
        entries = tl.load(pointers, mask=exists, other=0)
        if entries.dtype == tl.int1:
            scores = tl.where(entries, scores, float("-inf"))
        else:
            # What is added -inf is hidden, whatever the product is.
            entries = entries.to(tl.float32)
            scores = tl.where(entries == float("-inf"), float("-inf"), scores + entries)
    if MASKED:
        scores = tl.where(is_seen(queries, keys, rule, scoring.band), scores, float("-inf"))
    return scores, slope_of_softcap


@triton.jit
def is_seen(queries: tl.tensor, keys: tl.tensor, rule: Rule, band: Band) -> tl.tensor:
    """Whether each key exists and is in the window of each query."""
    end = band.keys
    if rule.window_right is not None:
        end = tl.minimum(end, queries + band.last + 1)
    seen = keys < end
    if rule.window_left is not None:
        seen = seen & (keys >= queries + band.first)
    return seen


@triton.jit
def log2_unit(rule: Rule, scoring: Scoring) -> tl.tensor:
    """What scores are multiplied by when they become exponents of 2.

    But for what a mask adds, which may be the least float32 there is: multiplied, it would be infinite.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    unit = 1.0
    if rule.mask is None:
        unit = unit_of(rule, scoring) * LOG2_E
    return unit


@triton.jit
def least_max(rule: Rule) -> tl.constexpr:
    """The maximum of no scores. A finite one keeps probabilities 0 where all are -inf, and -inf - -inf would be NaN."""
    return float("-inf") if rule.mask is not None else -3.4028234663852886e38


@triton.jit
def exponentials(
    scores: tl.tensor, row_max: tl.tensor, rule: Rule, scoring: Scoring, SCALED: tl.constexpr
) -> tl.tensor:
    """exp(scores - maximum), of a maximum in units of 1 / `log2_unit` and scores as `score` returns them, or SCALED."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if rule.mask is not None:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        exponentials = tl.exp2((scores - shift) * LOG2_E)
    elif SCALED:
        exponentials = tl.exp2(scores - row_max)
    else:
        exponentials = tl.exp2(scores * log2_unit(rule, scoring) - row_max)
    return exponentials


@triton.jit
def probabilities_of(
    scores: tl.tensor, exponent: tl.tensor, rule: Rule, scoring: Scoring, MASKED: tl.constexpr
) -> tl.tensor:
    """exp(unit * scores - logsumexp), of what the backward's rows kernel left in `exponent`."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    unit = unit_of(rule, scoring) * LOG2_E
    if rule.mask is not None:
        probabilities = tl.exp2((scores - exponent) * LOG2_E)
    else:
        probabilities = tl.exp2(scores * unit - exponent)
    return where_seen(probabilities, scores, rule, MASKED)


@triton.jit
def where_seen(numbers: tl.tensor, scores: tl.tensor, rule: Rule, MASKED: tl.constexpr) -> tl.tensor:
    """`numbers`, but 0 for hidden pairs, whatever their query or key holds."""
    if MASKED or rule.mask is not None:
        numbers = tl.where(scores == float("-inf"), 0.0, numbers)
    return numbers


@triton.jit
def weigh(
    weights: tl.tensor,  # [M, N] float32, 0 for hidden pairs
    scores: tl.tensor,  # [M, N], -inf for them
    tile: tl.tensor,  # [N, columns]: values, or keys
    accumulator: tl.tensor,  # [M, columns] float32
    GUARDED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Add weights . tile; if GUARDED, what is not finite in a row of `tile` reaches only those who see it.

    A product of matrices multiplies hidden rows by 0, and 0 * NaN is NaN. To look at every tile for what is not finite
    would cost more than masks do, so nothing is guarded at first: who `hides` something and finds NaN in the result
    computes it again, guarded; then such rows are added one at a time.
    """
    if GUARDED:
        is_finite = tl.abs(tile.to(tl.float32)) < float("inf")
        rest = tl.where(is_finite, 0.0, tile.to(tl.float32))
        tile = tl.where(is_finite, tile, 0.0)
        if tl.max(tl.max(tl.where(is_finite, 0, 1), 1), 0) > 0:
            numbers = tl.arange(0, tile.shape[0])
            for number in tl.range(0, tile.shape[0]):
                row = tl.sum(tl.where(numbers[:, None] == number, rest, 0.0), 0)[None, :]
                is_column = numbers[None, :] == number
                weight = tl.sum(tl.where(is_column, weights, 0.0), 1)[:, None]
                seen = tl.max(tl.where(is_column & (scores != float("-inf")), 1, 0), 1)[:, None] > 0
                accumulator += tl.where(seen & (row != 0.0), weight * row, 0.0)
    return tl.dot(weights.to(tile.dtype), tile, accumulator, input_precision=PRECISION)


@triton.jit
def hides(rule: Rule) -> tl.constexpr:
    """Whether a pair of a query and a key that exist may be hidden."""
    return rule.window_left is not None or rule.window_right is not None or rule.mask is not None


@triton.jit
def has_nan(tile: tl.tensor) -> tl.tensor:
    """Whether something in a tile [M, N] is NaN."""
    return tl.max(tl.max(tl.where(tile != tile, 1, 0), 1), 0) > 0


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent, to 2 roundings of float32.

    Near 0, where 1 - 2 / (exp(2 x) + 1) cancels, x + x^3 P(x^2) with P fitted to the least relative error (3e-9).
    """
    TWO_LOG2_E: tl.constexpr = 2.8853900817779268
    magnitude = tl.abs(x)
    square = x * x
    polynomial = -0.005895075388252735 * square + 0.020795896649360657
    polynomial = polynomial * square - 0.053783807903528214
    polynomial = polynomial * square + 0.13331924378871918
    polynomial = polynomial * square - 0.33333298563957214
    near = x + x * square * polynomial
    far = 1.0 - 2.0 / (tl.exp2(magnitude * TWO_LOG2_E) + 1.0)
    return tl.where(magnitude < 0.6, near, tl.where(x < 0.0, -far, far))
