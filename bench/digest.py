"""`python -m trilby.bench.digest`: what a run wrote as JSON, as the tables of MEASURED.md.

A line for every operation and shape; four columns for both dtypes and both directions, and what has other directions in
a second table. **Bold** numbers are losses. Nothing is measured here, and no row of the run is left out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .results import OURS, RIVAL

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
DIRECTIONS = {"forward": "forward", "forward+backward": "with backward"}
COLUMNS = tuple(product(DTYPES, DIRECTIONS))

Cells = Mapping[tuple[str, str], Mapping[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Print the tables of one run."""
    parser = argparse.ArgumentParser(prog="python -m trilby.bench.digest", description=__doc__)
    parser.add_argument("--json", type=Path, default="build/bench.json", help="the run (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        run = json.loads(options.json.read_text())
    except OSError as failure:
        sys.exit(f"--json {options.json}: {failure.strerror}; `make bench` writes it")
    print("\n".join(digest(run["rows"])))
    return 0


def digest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of both tables, in Markdown, of rows as `report.row_to_json` makes them."""
    compared = [row for row in rows if not row["is_self_check"]]
    kernels = [row for row in compared if (row["dtype"], row["direction"]) in COLUMNS]
    others = [row for row in compared if (row["dtype"], row["direction"]) not in COLUMNS]
    return [*_kernel_table(kernels), "", *_model_table(others)]


def _kernel_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cases: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["dtype"], row["direction"]] = row
    titles = " | ".join(f"{DTYPES[dtype]} {DIRECTIONS[direction]}" for dtype, direction in COLUMNS)
    lines = [f"| case | error | {titles} | ceiling |", "|---|---|" + "--:|" * (len(COLUMNS) + 1)]
    for case, cells in cases.items():
        ratios = " | ".join(_ratio(cells[column]) if column in cells else "" for column in COLUMNS)
        first = next(iter(cells.values()))
        lines.append(f"| {case} | {_error(first)} | {ratios} | {_share(first)} |")
    return lines


def _model_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| model | dtype | what | error | ratio | ceiling |", "|---|---|---|---|--:|--:|"]
    return lines + [
        f"| {_case(row)} | {row['dtype']} | {row['direction']} | {_error(row)} | {_ratio(row)} | {_share(row)} |"
        for row in rows
    ]


def _case(row: Mapping[str, Any]) -> str:
    setting = f", {row['setting']}" if row["setting"] else ""
    return f"{row['operation']} {row['shape']}{setting}"


def _ratio(row: Mapping[str, Any]) -> str:
    shown = f"{row['ratio']['p50']:.2f}"
    return f"**{shown}**" if row["is_slower"] else shown


def _error(row: Mapping[str, Any]) -> str:
    """Of the worst result, which is the first; none where a row is about time alone."""
    return ", ".join(f"{row['errors'][0]['by'][name]:.1e}" for name in (OURS, RIVAL)) if row["errors"] else ""


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share'][OURS]:.0%} ({row['share'][RIVAL]:.0%})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
