"""Labels beside points, so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

GAP = 8
"""Points (1/72 inch) between a mark's middle and its label."""

SIDES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
"""Where a label may be, seen from its mark; the first ones are preferred."""


def place_labels(axes: Axes, places: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write each label on the side of its mark where it covers least of what is there.

    Args:
        axes: whose marks are drawn already.
        places: coordinates of the marks.
        labels: one for each.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure.canvas.figure
    # The layout moves axes when it is drawn, and sizes on the paper count here.
    figure.draw_without_rendering()
    gap = GAP * figure.dpi / 72
    taken = [Bbox.from_bounds(x - gap / 2, y - gap / 2, gap, gap) for x, y in _drawn(axes, gap)]
    for place, label in zip(places, labels, strict=True):
        best = None
        for right, up in SIDES:
            text = axes.annotate(
                label,
                place,
                xytext=(GAP * right, GAP * up),
                textcoords="offset points",
                ha=("right", "center", "left")[right + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=9,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            box = text.get_window_extent()
            covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
            outside = _area(box) - _area(Bbox.intersection(box, axes.bbox))
            if best is None or covered + outside < best[0]:
                if best is not None:
                    best[1].remove()
                best = covered + outside, text, box
            else:
                text.remove()
        assert best is not None
        taken.append(best[2])


def _drawn(axes: Axes, step: float) -> Iterator[NDArray[np.float64]]:
    """Pixels along the lines and marks of axes, no farther apart than a step."""
    for line in axes.lines:
        corners = axes.transData.transform(np.column_stack(line.get_data()))
        yield corners[0]
        for start, end in pairwise(corners):
            count = max(1, math.ceil(np.hypot(*(end - start)) / step))
            yield from start + (end - start) * np.arange(1, count + 1)[:, None] / count


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)
