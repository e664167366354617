"""Levels for contours of a loss: fine around the minimum, wide above it, in few digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastswa.plane.grid import Array

FINEST, COARSEST = 0.03, 0.95
"""Shares of a grid's points that lie below the second level and below the last one."""


def contour_levels(values: Array, count: int = 10) -> Array:
    r"""Levels whose distances from the smallest value grow geometrically.

    .. math:: \ell_k = m + s_1 \left(\frac{s_2}{s_1}\right)^{(k - 1) / (n - 2)}, \qquad k = 1, \dots, n - 1

    where m is the smallest value and 3 % of the values are less than :math:`s_1` above it, 95 % less than :math:`s_2`:
    equal distances would spend all levels on the slopes. A first level lies at or below m. Each is rounded to a digit
    that the distance from the one below still shows.

    Args:
        values: of a grid; those that are not finite don't count.
        count: n, at least 3.

    Returns:
        At most `count` levels, ascending.

    Raises:
        ValueError: no finite values; a count out of range.

    Example:
        >>> contour_levels(2.0 + np.linspace(0.0, 1.0, 101) ** 2, count=6).tolist()
        [2.0, 2.0009, 2.005, 2.03, 2.2, 2.9]

    References:
        Garipov et al. 2018, Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, whose figures have levels at
        the smallest value plus powers.
    """
    if count < 3:
        raise ValueError(f"count must be at least 3, got {count}")
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ValueError("no value is finite, so there is nothing to draw")
    low = float(finite.min())
    above = finite[finite > low] - low
    if not above.size:
        unit = max(abs(low), 1.0) / 10
        return np.array([low - unit, low, low + unit])
    smallest, largest = (float(np.quantile(finite - low, share)) for share in (FINEST, COARSEST))
    largest = max(largest, float(above.min()))
    steps = np.geomspace(min(max(smallest, float(above.min())), largest), largest, count - 1)
    levels = [_round(low, steps[0], math.floor)]
    for step, below in zip(steps, (0.0, *steps), strict=False):
        level = _round(low + step, max(step - below, steps[0] / 2), round)
        if level > levels[-1]:
            levels.append(level)
    return np.array(levels)


def level_labels(levels: Array) -> list[str]:
    """Levels in as few digits, 6 or more, as tell each from its neighbours.

    Args:
        levels: ascending.

    Returns:
        Words for each.

    Example:
        >>> level_labels(np.array([0.1, 0.25])), level_labels(np.array([1234.5, 1234.5001]))
        (['0.1', '0.25'], ['1234.5', '1234.5001'])
    """
    gap = float(np.diff(levels).min()) if len(levels) > 1 else math.inf
    for digits in range(6, 18):
        labels = [f"{level:.{digits}g}" for level in levels]
        if max(abs(float(label) - level) for label, level in zip(labels, levels, strict=True)) <= gap / 100:
            break
    return labels


def _round(value: float, gap: float, rounding: Callable[[float], int]) -> float:
    digits = -math.floor(math.log10(gap))
    return round(rounding(value * 10.0**digits) / 10.0**digits, max(digits, 0))
