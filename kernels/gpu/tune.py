"""Measure launch parameters on the GPU that is here, and write those that beat the tables' own into a file.

Each row of the tables that serves this GPU is one question; its candidates are tried in the very calls that users make.
The answer must be clearly faster than the row, else the row stays: a run of it again would otherwise choose anew.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from triton import CompilationError
from triton.runtime.errors import TritonError

from ..options import AttentionOptions
from .attention_launch import MOST_DECODED_QUERIES, TABLES, place_of
from .attention_tiles import Row
from .measured import Measured, Place, trying
from .norm_launch import NORM_BACKWARD, NORM_FORWARD, norm_backward_tiles, norm_forward_tiles
from .targets import Device

# How much faster an answer must be than the table's row: less is noise on most GPUs.
LEAST_GAIN = 1.03
ROUNDS = 25
# More than any cache holds.
EVICTION_BYTES = 512 * 2**20
# A millisecond: forward and backward of a norm, through autograd, take the processor 0.8 ms beside an H200.
HOLD_CYCLES = 2_000_000
# Enough work to fill any GPU for a tenth of a millisecond.
TOKENS, ROWS, HEADS_WIDTH, LONGEST = 16384, 8192, 2048, 4096
HEADS_TOO_MANY_TO_DECODE = 8  # that share a key head: 8 of 16 queries are more rows than any decoding tile has

Numbers = Mapping[str, int]
Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Question:
    """Which launch parameters are best in place of one row of a table.

    Attributes:
        place: The row, as `measured.py` knows it.
        own: Its launch parameters.
        candidates: Others.
        run: Makes the tensors, and returns the call that is measured.
    """

    place: Place
    own: Numbers
    candidates: tuple[Numbers, ...]
    run: Callable[[], Callable[[], object]]

    def trial(self, numbers: Numbers, reason: str = "") -> Measured:
        """`numbers` in the row's place."""
        return Measured(self.place, numbers, reason)


def questions(
    device: Device,
    only: Sequence[str] = (),
    candidates: Callable[[Row], tuple[Numbers, ...]] | None = None,
    torch_device: str = "cuda",
) -> Iterator[Question]:
    """One for each row that serves `device`, of the tables named in `only`, or of all, but for TF32."""
    for name, table in TABLES.items():
        for row in table:
            is_asked = row.arithmetic != "tf32" and (not only or name in only)
            if device.target.name in row.targets and is_asked:
                yield Question(
                    place_of(table, device.target, row),
                    asdict(row.tiles),
                    tuple(
                        numbers
                        for numbers in (candidates or attention_candidates)(row)
                        if _is_choice(name, device, row, numbers)
                    ),
                    partial(_attention_call, name, row, torch_device),
                )
    for name, norms, tiles in (
        ("norm_forward", NORM_FORWARD, norm_forward_tiles),
        ("norm_backward", NORM_BACKWARD, norm_backward_tiles),
    ):
        for norm_row in norms:
            if not only or name in only:
                own = tiles(device, norm_row.width).num_warps
                yield Question(
                    Place(name, device.target.name, "", norm_row.width, 0, ""),
                    {"num_warps": own},
                    tuple({"num_warps": warps} for warps in (1, 2, 4, 8, 16) if warps != own),
                    partial(_norm_call, name, norm_row.width, torch_device),
                )


def _is_choice(table: str, device: Device, row: Row, numbers: Numbers) -> bool:
    """Whether a table's kernel knows what is turned on: descriptors are for plain scores, decoding has no switch."""
    own = asdict(row.tiles)
    if table == "decode" and any(numbers[name] != value for name, value in own.items() if isinstance(value, bool)):
        return False
    has_descriptors = table == "forward" and row.scores == "plain" and device.target.has_descriptors
    return has_descriptors or not numbers.get("descriptors")


def attention_choices(row: Row) -> tuple[Numbers, ...]:
    """The row's tiles with loads further or less far ahead, and with each switch turned: what never spills anew."""
    own = asdict(row.tiles)
    stages = tuple({**own, "num_stages": stages} for stages in (1, 2, 3, 4) if stages != own["num_stages"])
    return stages + tuple({**own, name: not value} for name, value in own.items() if isinstance(value, bool))


def attention_candidates(row: Row) -> tuple[Numbers, ...]:
    """Tiles from half to twice the row's, with 4 or 8 warps and up to 3 stages; a few dozen at most."""
    own = asdict(row.tiles)
    found = []
    for rows, keys, warps, stages in itertools.product(
        _around(row.tiles.block_m), _around(row.tiles.block_n), (4, 8), (1, 2, 3)
    ):
        numbers = {**own, "block_m": rows, "block_n": keys, "num_warps": warps, "num_stages": stages}
        if numbers != own and rows * keys >= 16 * 16 * warps // 4:
            found.append(numbers)
    return tuple(found)


def answer(question: Question, measure: Measure, device_name: str) -> Measured | None:
    """The best of the candidates, if it is clearly faster than the row; a candidate that cannot run is none."""
    call = question.run()
    with trying(question.trial(question.own)):
        own = measure(call)
    times = [(_seconds(question.trial(numbers), call, measure), numbers) for numbers in question.candidates]
    seconds, best = min(times, key=lambda pair: pair[0], default=(math.inf, question.own))
    if own < LEAST_GAIN * seconds:
        return None
    return question.trial(best, f"{own / seconds:.2f} times as fast as {_words(question.own)} on {device_name}")


def _seconds(trial: Measured, call: Callable[[], object], measure: Measure) -> float:
    try:
        with trying(trial):
            return measure(call)
    except (TritonError, CompilationError, RuntimeError):
        return math.inf


def median_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, its caches emptied before each, without the processor's time to launch it.

    `triton.testing.do_bench` hides launches behind the emptying alone, 60 us on an H200; every call that took the GPU
    less than 100 us then read as 100 or 150, the time of one launch or two, whatever it was launched with.
    """
    call()
    marks = []
    for _ in range(ROUNDS):
        empty_caches_and_hold()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in marks)) / 1e3


def empty_caches_and_hold() -> None:
    """Queue what writes more than any GPU's cache holds, and then what waits until a call is launched behind it."""
    torch.empty(EVICTION_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda._sleep(HOLD_CYCLES)


def _around(size: int) -> tuple[int, ...]:
    return tuple(each for each in (size // 2, size, size * 2) if 16 <= each <= 256)


def _words(numbers: Numbers) -> str:
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def _attention_call(table: str, row: Row, torch_device: str) -> Callable[[], object]:
    """A call that the row serves. Of a decoding row's queries each is a head; a forward's few have too many heads."""
    T, group = min(row.q_len, LONGEST), 1
    if table == "decode":
        T, group = 1, row.q_len
    elif row.q_len <= MOST_DECODED_QUERIES:
        group = HEADS_TOO_MANY_TO_DECODE
    B, H = TOKENS // LONGEST, max(HEADS_WIDTH // row.head_dim, 1)
    dtype = torch.bfloat16 if row.arithmetic == "half" else torch.float32
    query, grad_output = (_heads(B, H * group, T, row.head_dim, dtype, torch_device) for _ in range(2))
    key, value = (_heads(B, H, LONGEST, row.head_dim, dtype, torch_device) for _ in range(2))
    options = AttentionOptions.plain(T > 1, 1 / math.sqrt(row.head_dim))
    if row.scores == "rich":
        seed = torch.zeros(1, dtype=torch.int64, device=torch_device)
        options = options._replace(seed=seed, dropout_p=0.1)
    forward, backward = torch.ops.trilby.attention, torch.ops.trilby.attention_backward
    if table in ("forward", "decode"):
        return lambda: forward(query, key, value, *options)
    output, logsumexp = forward(query, key, value, *options)
    return lambda: backward(grad_output, query, key, value, output, logsumexp, *options)


def _heads(B: int, H: int, T: int, D: int, dtype: torch.dtype, torch_device: str) -> Tensor:
    return torch.randn(B, T, H, D, device=torch_device).to(dtype).transpose(1, 2)


def _norm_call(table: str, width: int, torch_device: str) -> Callable[[], object]:
    rows = torch.randn(ROWS, width, device=torch_device).to(torch.bfloat16)
    weight, bias = torch.ones(width, device=torch_device), torch.zeros(width, device=torch_device)
    forward, backward = torch.ops.trilby.norm, torch.ops.trilby.norm_backward
    if table == "norm_forward":
        return lambda: forward(rows, weight, bias, 1, True, 1e-5)
    _, mean, rstd = forward(rows, weight, bias, 1, True, 1e-5)
    return lambda: backward(rows, None, rows, mean, rstd, weight, bias, None, 1, True, 0.0)
