"""LAWA: the average of the latest models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastswa.rules import Rule, check_integer


@dataclass(frozen=True, repr=False)
class LAWA(Rule):
    r"""Latest weight averaging: the equal average of the last k models.

    .. math:: a_n = \frac{1}{\min(n + 1, k)} \sum_{i = \max(0, n + 1 - k)}^{n} p_i

    It keeps the k models themselves, the oldest of which each new one replaces. So it is no `multi_avg_fn`:
    WeightAverages holds it. The paper takes a model at the end of each epoch; set `every` to that.

    Args:
        window: k, at least 1: that many copies of the weights are kept.

    Raises:
        ValueError: a window that is no int or below 1.

    Example:
        >>> LAWA(window=3).copy_weights(4)
        (0.0, 1.0, 0.0)
        >>> LAWA(window=3).mixture(2)
        (0.5, 0.5, 0.0)

    References:
        Kaddour 2022, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging.
    """

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("window", self.window, 1)

    @property
    def copies(self) -> int:
        return self.window

    def refusal(self) -> str | None:
        return f"{self!r} keeps the latest models themselves, {self.window} copies; use fastswa.WeightAverages"

    def weight(self, n: int | Tensor) -> Any:
        raise TypeError(f"{self!r} is no running average with one weight; see copy_weights and mixture")

    def copy_weights(self, n: int | Tensor) -> tuple[Any, ...]:
        oldest = n % self.window
        if isinstance(oldest, Tensor):
            return tuple((oldest == index).double() for index in range(self.window))
        return tuple(float(oldest == index) for index in range(self.window))

    def mixture(self, n: int) -> tuple[float, ...]:
        check_integer("n", n, 1)
        filled = min(n, self.window)
        return tuple(1 / filled if index < filled else 0.0 for index in range(self.window))
