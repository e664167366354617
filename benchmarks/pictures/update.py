"""One update of one average, by network and provider."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.pictures.bars import card, legend
from benchmarks.pictures.measurements import disturbed, origin, read
from benchmarks.pictures.shares import COLUMNS, providers, shares, to_the_ceiling

FILES = ("cpu.csv",)
PLANS = {"fp32": "float32 weights and average", "mixed": "bfloat16 weights, float32 average"}


def draw(results: Path) -> Figure:
    """Draw the plans of the file side by side.

    Args:
        results: folder of the file.

    Raises:
        ValueError: the file lacks a column.
    """
    rows = [row for row in read(results / FILES[0], COLUMNS) if row["plan"] in PLANS]
    shown = providers(rows, PLANS)
    networks = len({row["case"] for row in rows})
    figure = card(11, 2.5 + networks * (0.3 + 0.17 * len(shown)), [origin(rows)])
    for axes, (plan, weights) in zip(figure.subplots(1, len(PLANS), sharex=True), PLANS.items(), strict=True):
        shares(axes, rows, plan, shown)
        to_the_ceiling(axes)
        axes.set_title(weights, fontsize=10, loc="left")
        axes.set_xlabel("% of the byte ceiling; at each bar the median time")
    title = "One update on a CPU, as a share of the speed at which the memory is read and written"
    legend(figure, title, shown, disturbed(rows))
    return figure
