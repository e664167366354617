"""A pass that recomputes BatchNorm statistics, by network and provider: time, and reads of the device."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.pictures.bars import Bar, bars, card, colours, legend
from benchmarks.pictures.measurements import NAMES, ORIGIN, Measurement, disturbed, milliseconds, number, origin, read

FILES = ("update_bn-cpu.csv",)
COLUMNS = (*ORIGIN, "case", "precision", "provider", "layers", "batch_size", "p50_ms", "device_reads_per_batch")
COLUMNS += ("disturbed", "checked")


def draw(results: Path) -> Figure:
    """Draw the networks beside one another, each with an axis of its own.

    Args:
        results: folder of the file.

    Raises:
        ValueError: the file lacks a column.
    """
    rows = read(results / FILES[0], COLUMNS)
    figure = card(11, 4, [origin(rows)])
    shown = colours(row["provider"] for row in rows)
    cases: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["precision"]), []).append(row)
    all_axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, ((case, _), group) in zip(all_axes, cases.items(), strict=True):
        name, first = case.split("_batch")[0], group[0]
        bars(axes, {"": [_bar(row, shown[row["provider"]]) for row in group]})
        axes.set_title(
            f"{NAMES.get(name, name)}, batch {first['batch_size']}, {first['layers']} layers", fontsize=10, loc="left"
        )
        axes.set_xlabel("ms; at each bar also the device reads a batch")
        axes.set_xlim(0, 1.7 * max(number(row, "p50_ms") or 0 for row in group))
    legend(figure, "Recomputing BatchNorm statistics on a CPU: median time a batch", shown, disturbed(rows))
    return figure


def _bar(row: Measurement, colour: str) -> Bar:
    time = number(row, "p50_ms")
    if time is None:
        return Bar(None, ": ".join(row["checked"].split(": ")[:2]), colour)
    reads = row["device_reads_per_batch"]
    return Bar(time, f"{milliseconds(time)}, {reads} reads", colour, disturbed([row]))
