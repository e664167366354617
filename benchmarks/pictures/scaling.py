"""The time of an update against the number of tensors, and against the number of averages."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from benchmarks.pictures.bars import card
from benchmarks.pictures.lines import lines, named, styles
from benchmarks.pictures.measurements import ORIGIN, disturbed, origin, read

FILES = ("scaling-cpu.csv",)
COLUMNS = (*ORIGIN, "series", "x", "provider", "elements", "tensors", "p50_us", "disturbed", "checked")
CEILING = "the machine: x.add_(y) on as many bytes"


def draw(results: Path) -> Figure:
    """Draw the series "tensors" and "averages", each with its own providers.

    Args:
        results: folder of the file.

    Raises:
        ValueError: the file lacks a column or a series.
    """
    path = results / FILES[0]
    rows = read(path, COLUMNS)
    figure = card(11, 10, [origin(rows)])
    for part, series in zip(figure.subfigures(2, height_ratios=(1.25, 1)), ("tensors", "averages"), strict=True):
        own = [row for row in rows if row["series"] == series]
        if not own:
            raise ValueError(f"{path} holds no series {series!r}: repeat the command without --series")
        shown = styles(row["provider"] for row in own if row["p50_us"])
        axes = part.subplots()
        lines(axes, own, "p50_us", shown, factor=1e-3)
        weights = f"{float(own[0]['elements']) / 1e6:.3g} M float32 weights"
        if series == "tensors":
            title = f"One update of {weights} on a CPU, in more and more tensors"
        else:
            title = f"Several averages of {weights} in {own[0]['tensors']} tensors on a CPU"
            numbers = sorted({int(row["x"]) for row in own})
            axes.xaxis.set_major_locator(FixedLocator(numbers))
            axes.xaxis.set_major_formatter(FixedFormatter([str(x) for x in numbers]))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"number of {series}")
        axes.set_ylabel("median ms; lower is better")
        named(part, title, shown, disturbed(own), CEILING)
    return figure
