"""The weights of single models in a PowerEMA, and their fit by those in stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastswa.power_ema import gamma_of

# Rows of the least-squares problem held at once; bounds the memory for long runs.
ROWS = 1 << 16


def fit(counts: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> tuple[list[float], float]:
    r"""The combination of stored averages that comes nearest to another one.

    Its result errs, in each element, by at most :math:`\mathrm{residual} \cdot \sqrt{\sum_i (p_i - \bar p)^2}` over the
    models :math:`p_i` of the run, whatever :math:`\bar p` is.

    Args:
        counts: models taken by each stored average, at least 1.
        gammas: of each, at least 0.
        step: models taken by the average asked for, from 1 to the largest of counts.
        gamma: of the average asked for, at least 0.

    Returns:
        The coefficients, with the sum 1, and the residual: the Euclidean distance between the weights of the models in
        the combination and in the average asked for.

    Raises:
        ValueError: no averages; a value out of range; averages too alike to tell apart.

    Example:
        >>> fit([50, 100, 100], [6.94, 6.94, 16.97], step=100, gamma=6.94)
        ([0.0, 1.0, 0.0], 0.0)

    References:
        Karras et al. 2024, Algorithm 3, with the discrete weights and without forming the normal equations.
    """
    if not counts:
        raise ValueError("no snapshots were given")
    for index, (count, own) in enumerate(zip(counts, gammas, strict=True)):
        if count < 1:
            raise ValueError(f"n of snapshot {index} must be at least 1, got {count}")
        try:
            gamma_of(own, None)
        except ValueError as error:
            raise ValueError(f"snapshot {index}: {error}") from None
        if (count, own) in zip(counts[:index], gammas[:index], strict=True):
            raise ValueError(f"snapshot {index} has the n ({count}) and gamma ({own}) of an earlier one")
    if not 1 <= step <= max(counts):
        raise ValueError(f"step must be from 1 to {max(counts)}, the most models of a snapshot, got {step}")
    origin = nearest(counts, gammas, step, gamma)
    others = [index for index in range(len(counts)) if index != origin]
    # As differences from the nearest, the sum of 1 is built in, and a stored average that is asked for gives zeros.
    reduced: Any = np.zeros((0, len(others) + 2))
    for low in range(0, max(counts), ROWS):
        models = np.arange(low, min(low + ROWS, max(counts)))
        base = profile(models, counts[origin], gammas[origin])
        columns = [profile(models, counts[index], gammas[index]) - base for index in others]
        columns += [profile(models, step, gamma) - base, base]
        # The triangular factor stands for all rows so far. Normal equations would square the condition number.
        reduced = np.linalg.qr(np.vstack([reduced, np.stack(columns, axis=1)]), mode="r")
    matrix, right, size = reduced[:, :-2], reduced[:, -2], np.linalg.norm(reduced[:, -1])
    left, singular, directions = np.linalg.svd(matrix, full_matrices=False)
    # A power errs by its exponent times one rounding; differences of that size are noise.
    noise = 4 * np.finfo(np.float64).eps * (max(gammas) + 2) * len(counts) ** 0.5 * size
    if len(singular) < len(others) or (singular <= noise).any():
        raise ValueError(f"the {len(counts)} snapshots are too alike to tell apart in float64; leave some out")
    solution = directions.T @ (left.T @ right / singular)
    coefficients = dict(zip(others, solution.tolist(), strict=True))
    coefficients[origin] = 1.0 - float(solution.sum())
    residual = float(np.linalg.norm(matrix @ solution - right))
    return [coefficients[index] for index in range(len(counts))], residual


def profile(models: NDArray[np.int64], n: int, gamma: float) -> NDArray[np.float64]:
    r"""The weights of single models in a PowerEMA.

    .. math:: c(i) = \left(\frac{i + 1}{n}\right)^{\gamma + 1} - \left(\frac{i}{n}\right)^{\gamma + 1}

    for i < n, else 0: the recursion's product of decays, telescoped. Over i < n they sum to 1.

    Args:
        models: i, counted from 0.
        n: models taken, at least 1.
        gamma: of the PowerEMA, at least 0.

    Returns:
        The weights, in float64.

    Example:
        >>> profile(np.arange(4), 2, 1.0).tolist()
        [0.25, 0.75, 0.0, 0.0]
    """
    taken = models < n
    after = np.where(taken, models + 1.0, 1.0)
    # The new model's own weight without cancellation; the first model's logarithm is minus infinity, its weight 1.
    with np.errstate(divide="ignore"):
        own = -np.expm1((gamma + 1) * np.log1p(-1 / after))
    result: NDArray[np.float64] = np.where(taken, own * (after / n) ** (gamma + 1), 0.0)
    return result


def nearest(counts: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> int:
    """The stored average that is nearest to another one, first in time, then in width.

    Args:
        counts: models taken by each stored average.
        gammas: of each.
        step: models taken by the average asked for.
        gamma: of the average asked for.

    Returns:
        Its index.

    Example:
        >>> nearest([50, 100, 100], [6.94, 6.94, 16.97], step=100, gamma=12.0)
        2
    """
    return min(range(len(counts)), key=lambda index: (abs(counts[index] - step), abs(gammas[index] - gamma)))
