"""The bandwidth of one update against the size of the model, for every provider and the byte ceiling."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.pictures.bars import card
from benchmarks.pictures.lines import lines, named, styles
from benchmarks.pictures.measurements import ORIGIN, disturbed, origin, read

FILES = ("scaling-cpu.csv",)
COLUMNS = (*ORIGIN, "series", "x", "provider", "tensors", "gb_per_second", "disturbed", "checked")


def draw(results: Path) -> Figure:
    """Draw the series "size".

    Args:
        results: folder of the file.

    Raises:
        ValueError: the file lacks a column, or holds no such series.
    """
    path = results / FILES[0]
    rows = [row for row in read(path, COLUMNS) if row["series"] == "size"]
    if not rows:
        raise ValueError(f"{path} holds no series 'size': repeat the command without --series")
    figure = card(11, 6.5, [origin(rows)])
    shown = styles(row["provider"] for row in rows if row["gb_per_second"])
    axes = figure.subplots()
    lines(axes, rows, "gb_per_second", shown)
    axes.set_xlabel(f"elements of the model, float32, in {rows[0]['tensors']} tensors")
    axes.set_ylabel("GB/s; higher is better")
    title = "One update on a CPU: bytes that it must move, over its median time"
    named(figure, title, shown, disturbed(rows), "the machine: x.add_(y) on as many bytes")
    return figure
