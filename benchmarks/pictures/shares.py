"""Updates as shares of the byte ceiling: how near each provider comes to the machine's bandwidth."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from matplotlib.axes import Axes

from benchmarks.pictures.bars import Bar, bars, colours
from benchmarks.pictures.measurements import NAMES, ORIGIN, Measurement, disturbed, milliseconds, number
from benchmarks.providers import CEILING

COLUMNS = (*ORIGIN, "case", "plan", "provider", "p50_us", "share_of_ceiling", "elements", "disturbed", "checked")


def providers(rows: Sequence[Measurement], plans: Container[str]) -> dict[str, str]:
    """The providers that are compared with the ceiling, each with its colour.

    Args:
        rows: of a file.
        plans: of the rows to draw.
    """
    return colours(row["provider"] for row in rows if row["plan"] in plans and _compared(row))


def shares(axes: Axes, rows: Sequence[Measurement], plan: str, shown: Mapping[str, str]) -> None:
    """Draw a plan's shares in percent, with the median time at each bar.

    Args:
        axes: to draw in.
        rows: of a file.
        plan: of the rows to draw.
        shown: the providers to draw and their colours.
    """
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        if row["plan"] == plan and row["provider"] in shown and _compared(row):
            name = f"{NAMES.get(row['case'], row['case'])}\n{int(row['elements']) / 1e6:.3g} M weights"
            groups.setdefault(name, []).append(_bar(row, shown[row["provider"]]))
    bars(axes, groups)


def to_the_ceiling(axes: Axes) -> None:
    """Let the axis end beyond the ceiling, and mark that.

    Args:
        axes: of shares.
    """
    axes.set_xlim(0, 128)
    axes.set_xticks(range(0, 101, 25))
    # Below the texts at the bars.
    axes.axvline(100, color="black", linewidth=1, zorder=0.9)


def _compared(row: Measurement) -> bool:
    """The ceiling itself has a share, too; a provider alone in its process has a time, but no share."""
    return row["provider"] != CEILING and (bool(row["share_of_ceiling"]) or not row["p50_us"])


def _bar(row: Measurement, colour: str) -> Bar:
    share, time = number(row, "share_of_ceiling"), number(row, "p50_us")
    if share is None or time is None:
        # Without what an exception says in detail.
        return Bar(None, ": ".join(row["checked"].split(": ")[:2]), colour)
    return Bar(100 * share, milliseconds(time / 1000), colour, disturbed([row]))
