"""Horizontal bars in groups, on a white card: readable in a light and in a dark page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch

SHADES = {
    "fastswa": ("#0b4f8a", "#4a93d1", "#a3cdf0"),
    "torch": ("#b93a0a", "#f2a56b"),
    "": (
        *("#4b5563", "#9ca3af", "#d1d5db", "#14532d", "#3f9a5b", "#a9dcb7", "#581c87", "#9a5fc9", "#d6bcf0"),
        *("#713f12", "#b98a2f", "#ead9a0"),
    ),
}
"""By the first word of a provider's name, the last for all others; told apart by lightness too."""

THICKNESS = 0.8
"""Of a bar; two bars are 1 apart, two groups 0.9 more."""
GAP = 0.9
HATCH = "////"


@dataclass(frozen=True)
class Bar:
    """A bar and what is written at its end.

    Args:
        length: None for a provider without a result.
        text: at its end.
        colour: of the bar.
        disturbed: whether other processes ran in more than half of its rounds; such a bar is hatched.
    """

    length: float | None
    text: str
    colour: str
    disturbed: bool = False


def colours(providers: Iterable[str]) -> dict[str, str]:
    """A colour for each provider.

    Args:
        providers: their names.

    Raises:
        ValueError: there are more of a kind than shades.
    """
    left = {kind: iter(shades) for kind, shades in SHADES.items()}
    found = {}
    for name in dict.fromkeys(providers):
        kind = name.split()[0]
        shade = next(left[kind if kind in left else ""], None)
        if shade is None:
            raise ValueError(f"no shade is left for the provider {name!r}")
        found[name] = shade
    return found


def bars(axes: Axes, groups: Mapping[str, Sequence[Bar]]) -> None:
    """Draw groups of bars from the top down.

    Args:
        axes: to draw in.
        groups: by the name at their left.
    """
    place, ticks = 0.0, []
    for group in groups.values():
        places = [place + index for index in range(len(group))]
        for at, bar in zip(places, group, strict=True):
            length, hatch = bar.length or 0, HATCH if bar.disturbed else None
            axes.barh(at, length, THICKNESS, color=bar.colour, edgecolor="white", linewidth=0, hatch=hatch)
            axes.annotate(
                bar.text,
                *((length, at), (3, 0)),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="0.45" if bar.length is None else "black",
                # Over the grid and the ceiling's line.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        ticks.append(sum(places) / len(places))
        place += len(group) + GAP
    axes.set_yticks(ticks, list(groups))
    axes.set_ylim(place - GAP - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def card(width: float, height: float, origins: Sequence[str]) -> Figure:
    """An empty figure that says below where its numbers come from.

    Args:
        width, height: in inches.
        origins: a line for each file.
    """
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.supxlabel("\n".join(origins), fontsize=8, color="0.35", x=0.01, ha="left")
    return figure


def legend(figure: FigureBase, title: str, colours: Mapping[str, str], disturbed: bool) -> None:
    """Name a figure and its colours.

    Args:
        figure: of the bars, or a part of it.
        title: one line.
        colours: by provider.
        disturbed: whether a bar is hatched.
    """
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if disturbed:
        note = "hatched: other processes ran in most rounds"
        handles.append(Patch(facecolor="0.6", edgecolor="white", linewidth=0, hatch=HATCH, label=note))
    named = figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9, title=title)
    named.set_alignment("left")
    named.get_title().set(fontsize=12, fontweight="bold")
