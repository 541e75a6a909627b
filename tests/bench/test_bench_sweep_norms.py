"""The sweep of norms: which cells there are, and that a lost one is printed."""

import pytest
import torch
from trilby.bench import sweep_norms
from trilby.bench.sweep_norms import Cell


def test_cells_are_every_size_in_both_directions() -> None:
    cells = list(sweep_norms.cells(("rms_norm",), ("float32", "bfloat16")))
    assert len(cells) == len(set(cells))
    assert {cell.C for cell in cells} == set(sweep_norms.WIDTHS)
    assert {cell.N for cell in cells} == set(sweep_norms.ROWS)
    assert {cell.direction for cell in cells} == {"forward", "forward+backward"}
    assert max(cell.N * cell.C for cell in cells) <= sweep_norms.MOST_ELEMENTS


@pytest.mark.parametrize("operation", sweep_norms.OPERATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_both_sides_compute_the_same(operation: str, direction: sweep_norms.Direction, by_kernel: bool) -> None:
    sides = Cell(operation, 3, 64, "float32", direction).sides(by_kernel)
    pytorch, trilby = (side() for side in sides)
    torch.testing.assert_close(trilby, pytorch)


def test_what_is_lost_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("layer_norm", 1, 2, "float32", "forward"), Cell("layer_norm", 1, 7, "float32", "forward")]
    monkeypatch.setattr(sweep_norms, "cells", lambda operations, dtypes: cells)
    monkeypatch.setattr(sweep_norms, "ratio", lambda cell, by_kernel, timer: 0.5 if cell.C == 2 else 1.5)
    monkeypatch.setattr(sweep_norms, "keep_memory", lambda: None)
    assert sweep_norms.main([]) == 1
    printed = capsys.readouterr().out
    assert "0.50  layer_norm 1x2 float32 forward" in printed
    assert "1x7" not in printed
    assert "1 of 2 cells are lost" in printed
