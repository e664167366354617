"""Several averages in one pass, and one average with stochastic rounding, by network and provider."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.pictures.bars import card, legend
from benchmarks.pictures.measurements import disturbed, origin, read
from benchmarks.pictures.shares import COLUMNS, providers, shares, to_the_ceiling

FILES = ("cpu.csv",)
AVERAGES = {"fp32_k2": "two float32 averages", "fp32_k4": "four float32 averages"}
ROUNDED = {"bf16_stochastic": "bfloat16 weights and average"}


def draw(results: Path) -> Figure:
    """Draw the three plans of the file.

    Args:
        results: folder of the file.

    Raises:
        ValueError: the file lacks a column.
    """
    rows = [row for row in read(results / FILES[0], COLUMNS) if row["plan"] in {**AVERAGES, **ROUNDED}]
    figure = card(11, 6, [origin(rows)])
    # A part each, because they compare different providers.
    upper, lower = figure.subfigures(2, height_ratios=(1.2, 1))
    parts = [
        (upper, AVERAGES, "Several averages on a CPU, as a share of the speed at which the memory is read and written"),
        (lower, ROUNDED, "One bfloat16 average, rounded at random or to nearest (another axis)"),
    ]
    for part, plans, title in parts:
        shown = providers(rows, plans)
        all_axes = part.subplots(1, len(plans), squeeze=False)[0]
        for axes, (plan, weights) in zip(all_axes, plans.items(), strict=True):
            shares(axes, rows, plan, shown)
            axes.set_title(weights, fontsize=10, loc="left")
            axes.set_xlabel("% of the byte ceiling; at each bar the median time")
        legend(part, title, shown, disturbed([row for row in rows if row["plan"] in plans]))
    for axes in upper.axes:
        to_the_ceiling(axes)
    lower.axes[0].margins(x=0.15)
    return figure
