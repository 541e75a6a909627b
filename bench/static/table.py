"""The static report as tables for people, and as JSON for programs."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .bound import PIPES, TENSOR
from .compiling import PROCESSORS
from .findings import Finding, KernelFinding, LoopFinding
from .subjects import OURS, OURS_BY_DESCRIPTOR, ROWS

MEASURES: dict[str, Callable[[Finding], float | None]] = {
    "instructions a score beside the tensor cores'": lambda one: one.beside_tensor,
    "bytes moved": Finding.bytes_moved,
}
# Characters that a compiler's last words may take.
FAILURE = 60
PIPES_BESIDE = tuple(pipe for pipe in PIPES if pipe != TENSOR)
HOW_TO_READ = (
    "per score: instructions of a thread for each score of query and key, in the loop that masks nothing, by pipe; "
    "beside: all but the tensor cores'.",
    "bound: the pipe that is busiest if everything overlaps, and the share of the tensor cores' peak that it leaves; "
    "in turns: the share if nothing overlaps. Bounds of a model (bench/static/bound.py), not measurements.",
    f"moved: bytes that a norm of {ROWS[0]} rows asks for on {PROCESSORS} multiprocessors, of which so much for each "
    f"row; kernels: how many were compiled for {len(ROWS)} numbers of rows.",
)


def attention_table(findings: Sequence[Finding]) -> Table:
    """A line for each kernel, and for each loop of one that has several unlike ones."""
    table = _table("registers", "KiB", "warps", *PIPES_BESIDE, "beside", "bound", "in turns")
    for finding, is_first, is_last in _grouped(findings):
        if is_first:
            table.add_row(" ".join(_group(finding)), style="bold")
        rows = [(kernel, loop) for kernel in finding.kernels for loop in kernel.unmasked]
        for number, (kernel, loop) in enumerate(rows):
            cells = (_name(finding, kernel), *_size(kernel), *_loop(loop))
            table.add_row(*cells, style=_style(finding), end_section=is_last and number == len(rows) - 1)
        if finding.failure:
            table.add_row(_name(finding), style="dim", end_section=is_last)
    return table


def norm_table(findings: Sequence[Finding]) -> Table:
    """A line for each norm."""
    table = _table("registers", "KiB", "warps", "moved, MB", "each row, B", "each program, B", "programs", "kernels")
    for finding, is_first, is_last in _grouped(findings):
        if is_first:
            table.add_row(" ".join(_group(finding)), style="bold")
        for kernel in finding.kernels:
            moved, traffic = finding.bytes_moved(), kernel.traffic
            cells = (
                f"{(moved or 0) / 1e6:.1f}",
                f"{traffic.per_row}" if traffic else "",
                f"{traffic.once}" if traffic else "",
                f"{finding.programs(kernel)}",
                f"{finding.variants}",
            )
            row = (_name(finding, kernel), *_size(kernel), *cells)
            table.add_row(*row, style=_style(finding), end_section=is_last)
        if finding.failure:
            table.add_row(_name(finding), style="dim", end_section=is_last)
    return table


def verdicts(findings: Sequence[Finding]) -> list[str]:
    """Where ours, as it is by default, is better than all others of its operation and target, and where not."""
    lines = []
    for group in dict.fromkeys(map(_group, findings)):
        alike = [finding for finding in findings if _group(finding) == group]
        ours = next((finding for finding in alike if finding.subject.project == OURS), None)
        others = [finding for finding in alike if not _is_ours(finding)]
        for what, measure in MEASURES.items():
            known = {one.subject.project: measure(one) for one in others}
            theirs = {project: value for project, value in known.items() if value is not None}
            mine = None if ours is None else measure(ours)
            if mine is not None and theirs:
                best = min(theirs, key=lambda name: theirs[name])
                word = "fewer" if mine < theirs[best] else "as many" if mine == theirs[best] else "MORE"
                lines.append(f"{group[0]} {group[1]}: {word} {what}: {_number(mine)}, {best} {_number(theirs[best])}")
    return lines


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Everything but the machine code."""
    return [
        {
            "target": finding.target,
            "project": finding.subject.project,
            "operation": finding.subject.operation,
            "failure": finding.failure,
            "candidates": finding.candidates,
            "variants": finding.variants,
            "beside_tensor": finding.beside_tensor,
            "bytes_moved": finding.bytes_moved(),
            "kernels": [_kernel_to_json(kernel) for kernel in finding.kernels],
        }
        for finding in findings
    ]


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """Write `to_json` to `path`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(findings), indent=1, default=str) + "\n")


def _kernel_to_json(kernel: KernelFinding) -> dict[str, Any]:
    launch = kernel.launch
    numbers = {name: value for name, value in vars(launch.compilation).items() if name != "assembly"}
    return {
        "kernel": launch.kernel,
        "warps": launch.warps,
        "constants": launch.constants,
        "resident_warps": kernel.resident_warps,
        "most_warps": kernel.most_warps,
        "traffic": asdict(kernel.traffic) if kernel.traffic else None,
        "loops": [_loop_to_json(loop) for loop in kernel.loops],
        **numbers,
    }


def _loop_to_json(loop: LoopFinding) -> dict[str, Any]:
    found: dict[str, Any] = {
        "scores": loop.scores,
        "instructions": loop.instructions,
        "beside_tensor": loop.beside_tensor,
    }
    if loop.bound is not None:
        found |= {
            "cycles": loop.bound.cycles,
            "bound_by": loop.bound.pipe,
            "tensor_use": loop.bound.tensor_use,
            "tensor_use_in_turns": loop.bound.tensor_use_in_turns,
        }
    return found


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _group(finding: Finding) -> tuple[str, str]:
    return finding.target, finding.subject.operation


def _grouped(findings: Sequence[Finding]) -> Iterator[tuple[Finding, bool, bool]]:
    """Each finding, and whether it is the first and the last of its target and operation."""
    before: tuple[str, str] | None = None
    for finding, following in zip(findings, [*findings[1:], None]):
        group = _group(finding)
        yield finding, group != before, following is None or _group(following) != group
        before = group


def _is_ours(finding: Finding) -> bool:
    return finding.subject.project in (OURS, OURS_BY_DESCRIPTOR)


def _style(finding: Finding) -> str:
    return "" if _is_ours(finding) else "dim"


def _name(finding: Finding, kernel: KernelFinding | None = None) -> str:
    if kernel is None:
        return f"  {finding.subject.project}: {finding.failure}"[:FAILURE]
    sizes = [str(value) for name, value in kernel.launch.constants.items() if name.startswith("BLOCK_")]
    tile = "x".join(sizes[: 4 if "BLOCK_M1" in kernel.launch.constants else 2])
    return f"  {finding.subject.project} {tile} {kernel.launch.warps} warps"


def _size(kernel: KernelFinding) -> tuple[str, str, str]:
    made = kernel.launch.compilation
    spills = f" SPILLS {made.spills}" if made.spills else ""
    warps = f"{kernel.resident_warps}/{kernel.most_warps}"
    return f"{made.registers}{spills}", f"{made.shared_bytes / 1024:.0f}", warps


def _loop(loop: LoopFinding) -> tuple[str, ...]:
    mix = tuple(f"{loop.per_score[pipe]:.1f}" for pipe in PIPES_BESIDE)
    if loop.bound is None:
        return (*mix, f"{loop.beside_tensor:.1f}", "", "")
    at_best = f"{loop.bound.pipe} {loop.bound.tensor_use:.0%}"
    return (*mix, f"{loop.beside_tensor:.1f}", at_best, f"{loop.bound.tensor_use_in_turns:.0%}")


def _number(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value > 1e4 else f"{value:.1f}"
