"""A run as a table for people and as JSON for programs; both are made of the same rows, and neither leaves any out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .machine import MIB, Ceilings, Machine
from .measure import SELF_CHECK_BOUND, quantiles
from .results import COMPILED, OURS, RIVAL, Row, Run, Training

HOW_TO_READ = (
    "error: the largest difference from the same in float64, in whichever output or gradient trilby does worst, "
    "trilby's then PyTorch's; INEXACT: more than twice PyTorch's.",
    "time ratio: PyTorch's time / trilby's, median of rounds in turns A B A B (20th to 80th percentile); "
    "above 1 trilby is faster, SLOWER marks where it is not.",
    "share of the ceiling: work done per second by trilby (by PyTorch) / the most this machine was seen to do: "
    "multiply-adds for attention and training, bytes copied for norms, bytes read for one query.",
    "attention's shapes: B x H x T x D; 12/4: heads of queries / of keys; 1/8192: queries / keys; packed: one tensor "
    "of all three; padded: under a mask; (100-1000): sequences of such lengths in a row.",
)

JSON_SCHEMA = 1


def table(run: Run) -> Table:
    """The one table."""
    compiled = any(COMPILED in row.seconds for row in run.rows)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("case")
    result.add_column("error:\ntrilby, PyTorch", justify="right")
    result.add_column("time ratio:\nPyTorch / trilby", justify="right")
    if compiled:
        result.add_column("time ratio:\ncompiled / trilby", justify="right")
    result.add_column("share of\nthe ceiling", justify="right")
    for row, following in zip(run.rows, [*run.rows[1:], None]):
        case, error, ratio, share = cells(row)
        extra = [ratio_cell(row, COMPILED) if COMPILED in row.seconds else ""] if compiled else []
        style = "bold red" if row.is_slower or not row.is_exact else "dim" if row.is_self_check or row.setting else ""
        ends_group = following is None or following.operation != row.operation
        result.add_row(case, error, ratio, *extra, share, style=style, end_section=ends_group)
    return result


def cells(row: Row) -> tuple[str, str, str, str]:
    """What the table says of a row: case, error, time ratio, share of the ceiling."""
    twice = "A/A " if row.is_self_check else ""
    setting = f", {row.setting}" if row.setting else ""
    case = f"{twice}{row.operation} {row.shape} {row.dtype} {row.direction}{setting}"
    shares = f"{row.share(row.ours):.0%} ({row.share(RIVAL):.0%})"
    return case, error_cell(row), ratio_cell(row, RIVAL), shares


def error_cell(row: Row) -> str:
    """Ours and the rival's, of the result that is worst for us."""
    if not row.errors:
        return ""
    worst = row.errors[0]
    pair = f"{worst.by[OURS]:.1e} {worst.by[RIVAL]:.1e}"
    return pair if row.is_exact else f"INEXACT {pair}"


def ratio_cell(row: Row, contestant: str) -> str:
    """The ratio to `contestant` with its spread, and a mark if it is a loss."""
    ratio = row.ratio_to(contestant)
    lost = not row.is_self_check and round(ratio.p50, 2) < 1
    return ("SLOWER " if lost else "") + f"{ratio.p50:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"


def heading(machine: Machine, ceilings: Ceilings) -> list[str]:
    """Where the run takes place and what is possible there."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in ceilings.flops.items())
    copies = ", ".join(f"{copy.rate / 1e9:.0f} GB/s of {copy.moved / 2**20:.0f} MiB" for copy in ceilings.copies)
    reads = "".join(
        f", {read.rate / 1e9:.0f} GB/s of {read.moved / 2**20:.0f} MiB only read" for read in ceilings.reads
    )
    served = ", ".join(sorted(set(machine.services.values())))
    gpu = f"{machine.gpu}, under " if machine.gpu else ""
    return [
        f"{gpu}{machine.processor}, {machine.cores} processors, {machine.threads} threads, "
        f"{machine.memory_bytes / 2**30:.0f} GiB, {machine.system}; {versions}; "
        f"PyTorch runs {machine.capability}, trilby {served}",
        f"ceilings, the most that was reached here: multiply-adds {rates} (torch.mm; what float32 reaches, bfloat16 "
        f"can); copies {copies}{reads}",
    ]


def foot(run: Run) -> list[str]:
    """How to read the table, what the losses say, and whether the run can be believed."""
    return [
        *HOW_TO_READ,
        _score(run),
        *map(_curves, run.trainings),
        *_memory(run),
        *([] if run.machine.gpu else [_allocation()]),
        *_repeats(run),
        *_self_check(run),
        *_alarms(run),
    ]


def _score(run: Run) -> str:
    slower = sum(row.is_slower for row in run.comparisons)
    faster = sum(round(row.ratio.p50, 2) > 1 for row in run.comparisons)
    even = len(run.comparisons) - slower - faster
    return f"{len(run.comparisons)} cases: trilby is faster in {faster}, even in {even}, slower in {slower}."


def _curves(training: Training) -> str:
    verdict = "agree" if training.agrees else "DISAGREE"
    curve = training.losses[RIVAL]
    return (
        f"{training.model} in {training.dtype} on {training.text}: {len(curve)} steps, "
        f"loss {curve[0]:.3f} -> {curve[-1]:.3f}, "
        f"{training.tokens_per_second[OURS]:.0f} tokens/s with trilby, "
        f"{training.tokens_per_second[RIVAL]:.0f} with PyTorch; "
        f"the two loss curves {verdict}: they differ by at most {training.largest_difference:.1e}, "
        f"where a step changes the loss by {training.usual_change:.1e}."
    )


def _memory(run: Run) -> list[str]:
    """What a step of an unchanged model needs beyond its weights, and a norm in each setting of the allocator."""
    steps = [f"{row.operation} {shown}" for row in run.rows if row.direction == "step" and (shown := _peaks(row))]
    calls = [f"{shown} {row.setting}" for row in run.rows if "keep_memory" in row.setting and (shown := _peaks(row))]
    lines = [f"peak memory of a step, with trilby (with PyTorch): {', '.join(steps)}."] if steps else []
    if calls:
        lines.append(f"peak memory of the first norm in the table, of trilby's (PyTorch's): {', '.join(calls)}.")
    return lines


def _peaks(row: Row) -> str:
    ours, rival = (row.peak_bytes.get(name) for name in (OURS, RIVAL))
    return "" if ours is None or rival is None else f"{ours / MIB:.0f} MiB ({rival / MIB:.0f})"


def _allocation() -> str:
    return (
        "but for the first norm in the table, trilby.kernels.keep_memory() holds for both sides: the C library "
        "otherwise gives every tensor above 32 MiB back to the system when it is freed, and paying for its pages again "
        "hides the kernels."
    )


def _repeats(run: Run) -> list[str]:
    if not run.repeats:
        return []
    counted = ", ".join(f"{one.name}: {one.differing} of {one.repeats}" for one in run.repeats)
    return [f"runs with other bits than the first, forward and backward: {counted}."]


def _self_check(run: Run) -> list[str]:
    if not run.self_checks:
        return []
    read = ", ".join(f"{row.ratio.p50:.2f} ({row.ratio.p20:.2f}-{row.ratio.p80:.2f})" for row in run.self_checks)
    return [f"A/A, PyTorch against itself timed the same way, reads {read}; allowed is 1.00 +- {SELF_CHECK_BOUND:.2f}."]


def _alarms(run: Run) -> list[str]:
    """What must not be overlooked."""
    alarms = []
    if run.is_noisy:
        alarms.append(
            "NOISY RUN: PyTorch against itself is not 1. The time ratios above are not to be believed; "
            f"let the machine rest (its load was {run.machine.load:.1f} before this run) and run again."
        )
    inexact = [cells(row)[0] for row in run.comparisons if not row.is_exact]
    if inexact:
        alarms.append(f"INEXACT: error above the rule in {'; '.join(inexact)}.")
    unstable = [one.name for one in run.repeats if one.differing]
    if unstable:
        alarms.append(f"RACE: the bits change from run to run in {'; '.join(unstable)}.")
    if not all(training.agrees for training in run.trainings):
        alarms.append("LOSS CURVES DISAGREE: training with trilby is not the same training.")
    return alarms


def is_alarm(line: str) -> bool:
    """Whether a line of the foot is an alarm."""
    return line.partition(":")[0].isupper()


def to_json(run: Run) -> dict[str, Any]:
    """Everything, raw numbers included."""
    return {
        "schema": JSON_SCHEMA,
        "command": run.command,
        "seconds": run.seconds,
        "settings": dict(run.settings),
        "machine": asdict(run.machine),
        "ceilings": asdict(run.ceilings),
        "rows": [row_to_json(row) for row in run.rows],
        "trainings": [training_to_json(training) for training in run.trainings],
        "repeats": [asdict(one) for one in run.repeats],
        "advice": list(run.advice),
        "is_noisy": run.is_noisy,
        "foot": foot(run),
    }


def row_to_json(row: Row) -> dict[str, Any]:
    """One line of the table; `cells` is what the table shows of it."""
    return {
        "operation": row.operation,
        "shape": row.shape,
        "dtype": row.dtype,
        "direction": row.direction,
        "setting": row.setting,
        "why": row.why,
        "is_self_check": row.is_self_check,
        "is_slower": row.is_slower,
        "is_exact": row.is_exact,
        "ratio": asdict(row.ratio),
        "seconds": {name: _seconds(values) for name, values in row.seconds.items()},
        "rate": {name: asdict(row.rate(name)) for name in row.seconds},
        "share": {name: row.share(name) for name in row.seconds},
        "absent": dict(row.absent),
        "work": asdict(row.work),
        "errors": [asdict(error) | {"within_rule": error.within_rule} for error in row.errors],
        "peak_bytes": dict(row.peak_bytes),
        "cells": list(cells(row)),
    }


def _seconds(values: Sequence[float]) -> dict[str, Any]:
    return asdict(quantiles(values)) | {"raw": list(values)}


def training_to_json(training: Training) -> dict[str, Any]:
    """A pair of loss curves."""
    return {
        "dtype": training.dtype,
        "model": training.model,
        "text": training.text,
        "losses": {name: list(values) for name, values in training.losses.items()},
        "tokens_per_second": dict(training.tokens_per_second),
        "largest_difference": training.largest_difference,
        "usual_change": training.usual_change,
        "agrees": training.agrees,
    }


def write_json(run: Run, path: Path) -> None:
    """Write `to_json` to `path`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(run), indent=1) + "\n")
