"""Contours of a loss on a plane of weight space, with the weights that lie on it or near it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastswa.plane.grid import PlaneGrid
from fastswa.plane.labels import place_labels
from fastswa.plane.levels import contour_levels, level_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("$w_1$", "$w_2$", "$w_3$")

OFF = 0.01
"""From which distance off the plane a point's label tells it, as a share of the picture's width."""


def plot(
    grid: PlaneGrid,
    value: str,
    *,
    points: Mapping[str, Sequence[float]] | None = None,
    path: str | os.PathLike[str] | None = None,
    axes: Axes | None = None,
    levels: int | Sequence[float] = 10,
) -> Axes:
    """Draw a value of a grid as filled contours, and mark weights on it.

    Needs matplotlib (`pip install fastswa[plot]`), but neither pyplot nor a window.

    Args:
        grid: of `WeightPlane.evaluate` or `PlaneGrid.load`; points still to be found stay white.
        value: the value's name.
        points: to be marked, by label: coordinates (x, y), or (x, y, distance) as `WeightPlane.coordinates` gives them.
            A label tells the distance of a point that is off the plane, where the model need not have the value that is
            drawn. The points that the plane goes through are circles, others stars. The former three if left out.
        path: of the picture, which is written in the format of its ending: .png, .pdf or .svg.
        axes: to draw in; of a figure of their own if left out.
        levels: of the contours: how many, for those of `contour_levels`, or themselves, ascending.

    Returns:
        The axes; `axes.figure` is the picture.

    Raises:
        KeyError: no such value.
        ValueError: no finite value.
        ImportError: matplotlib is missing.

    Example:
        >>> from fastswa.plane import WeightPlane
        >>> corners = [torch.nn.Linear(2, 1) for _ in range(3)]
        >>> plane = WeightPlane(*corners)
        >>> grid = plane.evaluate(corners[0], lambda model: model.weight.norm(), *plane.grid(points=5))
        >>> axes = plot(grid, "value", points={"start": plane.points[0], "zero": (1.0, 0.5)})
        >>> axes.get_xlabel()
        'distance along $w_2 - w_1$'
    """
    try:
        from matplotlib.colors import BoundaryNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install fastswa[plot]") from error
    if value not in grid.values:
        raise KeyError(f"the grid has no value {value!r}; it has {sorted(grid.values)}")
    values = grid.values[value]
    chosen = contour_levels(values, levels) if isinstance(levels, int) else np.asarray(levels, np.float64)
    if axes is None:
        # A Figure by itself draws with Agg; pyplot would choose a backend for the whole process.
        axes = Figure(figsize=(6, 4.8), dpi=150, layout="constrained").subplots()
    figure = axes.figure.canvas.figure

    extend: Any = ("neither", "max", "min", "both")[(values > chosen[-1]).any() + 2 * (values < chosen[0]).any()]
    # A diverged model is above every level, not unknown.
    shown = np.ma.masked_invalid(np.where(values == np.inf, 2 * abs(chosen[-1]) + 1, values))
    colours = BoundaryNorm(chosen, 256, extend=extend)
    filled = axes.contourf(grid.x, grid.y, shown, chosen, norm=colours, cmap="viridis", extend=extend)
    axes.contour(grid.x, grid.y, shown, chosen, colors="black", linewidths=0.4, alpha=0.5)
    # Inside the axes' own frame, so that it is as high as they are once their aspect is applied.
    room = axes.inset_axes((1.03, 0.0, 0.05, 1.0))
    bar = figure.colorbar(filled, cax=room, label=value, ticks=chosen, spacing="uniform", drawedges=True)
    bar.ax.set_yticklabels(level_labels(chosen))
    bar.ax.minorticks_off()

    axes.set(xlabel="distance along $w_2 - w_1$", ylabel="distance orthogonal to it", aspect="equal")
    width = float(grid.x[-1] - grid.x[0])
    places, labels = [], []
    for label, (x, y, *distance) in (dict(zip(NAMES, grid.points, strict=True)) if points is None else points).items():
        spans = any(np.hypot(x - own[0], y - own[1]) < 1e-6 * width for own in grid.points)
        axes.plot(x, y, "o" if spans else "*", color="white", markeredgecolor="black", markersize=6 if spans else 12)
        off = distance[0] if distance else 0.0
        places.append((x, y))
        labels.append(f"{label}\n{off:.2g} off the plane" if off > OFF * width else label)
    place_labels(axes, places, labels)
    if path is not None:
        figure.savefig(path)
    return axes
