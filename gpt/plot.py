"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SMOOTHED = 50  # points that a curve of many is averaged over: a batch's loss jumps by more than a step changes it


@dataclass(frozen=True)
class Curve:
    """Points to join."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def draw_losses(path: Path, curves: Sequence[Curve], x_label: str = "step") -> None:
    """Write the loss curves, nats per token over `x_label`, to `path`: SVG, PNG or PDF, as its name ends.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture of the losses needs matplotlib: pip install 'trilby[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(curve.x, curve.y, label=curve.label, linestyle="--" if curve.dashed else "-", linewidth=1.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    # Neither a date nor random names, so that the same curves are the same file.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "trilby"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def smoothed(curve: Curve) -> Curve:
    """`curve` with each point the mean of those around it, and a tenth of a run at the most."""
    width = max(1, min(SMOOTHED, len(curve.y) // 10))
    sums = [0.0]
    for value in curve.y:
        sums.append(sums[-1] + value)
    means = [(sums[end] - sums[end - width]) / width for end in range(width, len(sums))]
    return Curve(curve.label, curve.x[width // 2 : width // 2 + len(means)], means, curve.dashed)
