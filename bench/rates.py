"""What was reached on a GPU, contestant by contestant: TFLOP/s of attention and GB/s of norms, as a table and plots."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from .report import error_cell, ratio_cell
from .results import OURS, RIVAL, Row, Run

UNITS = {"flop": ("TFLOP/s", 1e12), "byte": ("GB/s", 1e9)}


def rates_table(run: Run) -> Table:
    """A line for each case, a column for each contestant: the median round, and the 20th to the 80th percentile."""
    names = list(dict.fromkeys(name for row in run.comparisons for name in row.seconds))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case")
    table.add_column("error:\ntrilby, PyTorch", justify="right")
    table.add_column("time ratio:\nbest other / trilby", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for row, following in zip(run.comparisons, [*run.comparisons[1:], None]):
        case = f"{row.operation} {row.shape} {row.dtype} {row.direction}, {UNITS[row.work.unit][0]}"
        cells = [rate_cell(row, name) for name in names]
        style = "" if row.is_exact else "bold red"
        ends_group = following is None or following.operation != row.operation
        table.add_row(
            case, error_cell(row), ratio_cell(row, best_other(row)), *cells, style=style, end_section=ends_group
        )
    return table


def rate_cell(row: Row, contestant: str) -> str:
    """What a contestant reached; a dash where the case is not for it, nothing where it does not take part."""
    if contestant not in row.seconds:
        return "-" if contestant in row.absent else ""
    rate, unit = row.rate(contestant), UNITS[row.work.unit][1]
    return f"{rate.p50 / unit:.0f} ({rate.p20 / unit:.0f}-{rate.p80 / unit:.0f})"


def best_other(row: Row) -> str:
    """The fastest of those who are not us."""
    return max((name for name in row.seconds if name != OURS), key=lambda name: row.rate(name).p50, default=RIVAL)


def losses(run: Run) -> list[str]:
    """Where somebody is faster, and how many cases that leaves; who did not take part, and why."""
    lost = [row for row in run.comparisons if round(row.ratio_to(best_other(row)).p50, 2) < 1]
    lines = [f"{len(run.comparisons)} cases: in {len(lost)} somebody is faster than trilby."]
    reasons: dict[str, set[str]] = {}
    for row in run.comparisons:
        for name, reason in row.absent.items():
            reasons.setdefault(f"{name} cannot run some cases: {reason}", set()).add(row.shape)
    return lines + [f"{reason} ({', '.join(sorted(shapes))})" for reason, shapes in reasons.items()]


def write_plots(run: Run, folder: Path) -> list[Path]:
    """A picture of each family of cases that differ in their length or width alone, as SVG; the paths written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, rows in families(run.comparisons).items():
        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        unit, scale = UNITS[rows[0].work.unit]
        for name in dict.fromkeys(name for row in rows for name in row.seconds):
            points = [(row.shape, row.rate(name)) for row in rows if name in row.seconds]
            middle = [rate.p50 / scale for _, rate in points]
            below = [(rate.p50 - rate.p20) / scale for _, rate in points]
            above = [(rate.p80 - rate.p50) / scale for _, rate in points]
            places = [shape for shape, _ in points]
            axes.errorbar(
                places, middle, (below, above), marker="o", capsize=3, label=name, lw=2 if name == OURS else 1
            )
        axes.set(title=f"{title}\n{run.machine.gpu or run.machine.processor}", ylabel=unit, ylim=(0, None))
        axes.tick_params(axis="x", rotation=30)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / ("_".join(title.replace("+", "_").split()) + ".svg")
        figure.savefig(path, bbox_inches="tight")
        written.append(path)
    return written


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that belong into one picture, by its title: attention by head dimension, norms by operation."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        kind = ""
        if row.operation == "attention":
            size, _, mode = row.shape.partition(" ")
            kind = f" D {size.rpartition('x')[2]} {mode or 'causal'}"
        found.setdefault(f"{row.operation}{kind} {row.dtype} {row.direction}", []).append(row)
    return found
