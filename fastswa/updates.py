"""What a prepared update can do, whatever device runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Random = tuple[int, int | Tensor] | None
"""Seed and step of stochastic rounding; None to round to nearest."""


class Update(Protocol):
    """An update of fixed tensors, prepared to run again and again."""

    def lerp_(self, weight: float | Tensor) -> None:
        """Move the averages towards their sources by `weight`, and make the copies."""


class MultiUpdate(Protocol):
    """An update of several sets of averages of the same tensors, prepared to run again and again."""

    def lerp_(self, weights: Sequence[float] | Tensor, random: Random, skip: Tensor | None) -> None:
        """Move each set towards the sources by its weight, and make the copies; nothing where `skip` is not zero."""


class Moments(Protocol):
    """Running moments of fixed tensors, prepared to take one model after another."""

    def update_(self, weight: float, slot: int | None) -> None:
        """Take the sources' present values by `weight`, and write their deviations into a slot of the ring, or none."""
