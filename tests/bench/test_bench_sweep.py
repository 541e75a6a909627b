"""The sweep: which cells there are, that both sides of one compute the same, and that a lost one is printed."""

import pytest
import torch
from trilby.bench.sweep import __main__ as sweep
from trilby.bench.sweep import attention, norm
from trilby.bench.sweep.attention import AttentionCell
from trilby.bench.sweep.norm import NormCell


def test_cells_of_norms_are_every_size_in_both_directions() -> None:
    cells = list(norm.norm_cells(("rms_norm",), ("float32", "bfloat16")))
    assert len(cells) == len(set(cells))
    assert {cell.C for cell in cells} == set(norm.WIDTHS)
    assert {cell.N for cell in cells} == set(norm.ROWS)
    assert {cell.direction for cell in cells} == {"forward", "forward+backward"}
    assert max(cell.N * cell.C for cell in cells) <= norm.MOST_ELEMENTS


def test_cells_of_attention_are_every_size_of_the_common_kinds_and_some_of_the_others() -> None:
    cells = list(attention.attention_cells(("causal", "full", "padding"), ("float32",)))
    assert len(cells) == len(set(cells))
    common = [cell for cell in cells if cell.kind != "padding"]
    assert {(cell.B, cell.H) for cell in common} == set(attention.HEADS)
    assert {cell.D for cell in common} == set(attention.WIDTHS)
    assert {(cell.T, cell.S) for cell in cells if cell.kind == "full"} == set(attention.OTHER_LENGTHS)
    assert all(cell.H == 12 and cell.D == 64 for cell in cells if cell.kind == "padding")
    assert max(cell.B * cell.H * cell.T * cell.S * cell.D for cell in cells) <= attention.MOST_MULTIPLICATIONS


def test_every_kind_is_swept() -> None:
    kinds = {cell.kind for cell in sweep.cells(sweep.KINDS, ("float16",))}
    assert kinds == set(sweep.KINDS)


@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_both_sides_of_a_norm_compute_the_same(kind, direction, by_kernel) -> None:
    pytorch, trilby = (side() for side in NormCell(kind, 3, 64, "float32", direction).sides(by_kernel))
    torch.testing.assert_close(trilby, pytorch)


@pytest.mark.parametrize("kind", [kind for kind in attention.KINDS if kind != "dropout"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_both_sides_of_attention_compute_the_same(kind, direction, by_kernel) -> None:
    pytorch, trilby = (side() for side in AttentionCell(kind, 1, 4, 40, 40, 16, "float32", direction).sides(by_kernel))
    torch.testing.assert_close(trilby, pytorch, rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [NormCell("layer_norm", 1, 2, "float32", "forward"), NormCell("layer_norm", 1, 7, "float32", "forward")]
    monkeypatch.setattr(sweep, "cells", lambda kinds, dtypes: cells)
    monkeypatch.setattr(sweep, "ratio", lambda cell, by_kernel, timer: 0.5 if cell.C == 2 else 1.5)
    monkeypatch.setattr(sweep, "keep_memory", lambda: None)
    assert sweep.main([]) == 1
    printed = capsys.readouterr().out
    assert "0.50  layer_norm 1x2 float32 forward, PyTorch's kernel" in printed
    assert "1x7" not in printed
    assert "1 of 2 cells are lost" in printed
