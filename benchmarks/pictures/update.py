"""One update of one average, by network and provider: fresh processes beside a settled allocator."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.pictures.bars import card, legend
from benchmarks.pictures.measurements import disturbed, origin, read
from benchmarks.pictures.shares import COLUMNS, providers, shares, to_the_ceiling

FILES = ("cpu-settled-allocator.csv", "cpu.csv")
PROCESSES = ("allocator settled, as after training", "fresh process")
"""In which each file was measured."""

PLANS = {"fp32": "float32 weights and average", "mixed": "bfloat16 weights, float32 average"}


def draw(results: Path) -> Figure:
    """Draw the two files side by side.

    Args:
        results: folder of the files.

    Raises:
        ValueError: a file lacks a column.
    """
    files = {process: read(results / file, COLUMNS) for process, file in zip(PROCESSES, FILES, strict=True)}
    figure = card(11, 12.5, [origin(rows) for rows in files.values()])
    shown = providers([row for rows in files.values() for row in rows], PLANS)
    all_axes = figure.subplots(len(PLANS), len(files), sharex=True, sharey="row")
    for line, (plan, weights) in zip(all_axes, PLANS.items(), strict=True):
        for axes, (process, rows) in zip(line, files.items(), strict=True):
            shares(axes, rows, plan, shown)
            to_the_ceiling(axes)
            axes.set_title(f"{weights}\n{process}", fontsize=10, loc="left")
    for axes in all_axes[-1]:
        axes.set_xlabel("% of the byte ceiling; at each bar the median time")
    title = "One update on a CPU, as a share of the speed at which the memory is read and written"
    legend(figure, title, shown, any(map(disturbed, files.values())))
    return figure
