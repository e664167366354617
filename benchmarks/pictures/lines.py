"""Lines over a growing number, on a white card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from benchmarks.pictures.bars import colours
from benchmarks.pictures.measurements import Measurement, disturbed, number
from benchmarks.providers import CEILING

MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Style:
    """How a provider's line looks.

    Args:
        colour: of line and points.
        marker: of points; the ceiling has none.
        strong: whether it lies above the others and is thicker, as fastswa's does.
    """

    colour: str
    marker: str
    strong: bool

    def line(self, **more: object) -> dict[str, object]:
        """Options of a matplotlib line.

        Args:
            **more: others.
        """
        ceiling = not self.marker
        return {
            "color": self.colour,
            "marker": self.marker or None,
            "markersize": 5,
            "markeredgecolor": "0.25",
            "markeredgewidth": 0.5,
            "linewidth": 2.4 if self.strong else 1.3,
            "linestyle": "--" if ceiling else "-",
            "zorder": 3 if self.strong else 2,
        } | more


def styles(providers: Iterable[str]) -> dict[str, Style]:
    """A look for each provider.

    Args:
        providers: their names.

    Raises:
        ValueError: there are more of a kind than shades.
    """
    names = list(dict.fromkeys(providers))
    shades = colours(name for name in names if name != CEILING)
    markers = cycle(MARKERS)
    found = {name: Style(shade, next(markers), name.startswith("fastswa")) for name, shade in shades.items()}
    if CEILING in names:
        found[CEILING] = Style("black", "", False)
    return found


def lines(axes: Axes, rows: Sequence[Measurement], column: str, shown: Mapping[str, Style], factor: float = 1) -> None:
    """Draw a line for each provider, on logarithmic axes.

    Args:
        axes: to draw in.
        rows: of one series, with the columns "x", "provider" and "disturbed".
        column: to show; rows without a value have no point.
        shown: the providers.
        factor: of the values.
    """
    for name, style in shown.items():
        own = [(row, number(row, column)) for row in rows if row["provider"] == name]
        points = [(int(row["x"]), factor * value, disturbed([row])) for row, value in own if value is not None]
        if not points:
            continue
        axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), **style.line(label=name))
        doubtful = [(x, y) for x, y, other in points if other and style.marker]
        if doubtful:
            hollow = style.line(
                linestyle="", markerfacecolor="white", markeredgecolor=style.colour, markeredgewidth=1.2
            )
            axes.plot(*zip(*doubtful, strict=True), **hollow)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def named(figure: FigureBase, title: str, shown: Mapping[str, Style], hollow: bool, ceiling: str = CEILING) -> None:
    """Name a figure and its lines.

    Args:
        figure: of the lines, or a part of it.
        title: one line.
        shown: by provider.
        hollow: whether a point was disturbed.
        ceiling: what its line is.
    """
    handles = [
        Line2D([], [], **style.line(label=ceiling if name == CEILING else name)) for name, style in shown.items()
    ]
    if hollow:
        note = "hollow: other processes ran in most rounds"
        handles.append(Line2D([], [], linestyle="", marker="o", color="0.4", markerfacecolor="white", label=note))
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9, title=title)
    legend.set_alignment("left")
    legend.get_title().set(fontsize=12, fontweight="bold")
