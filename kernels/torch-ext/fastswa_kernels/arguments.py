"""What the numbers of one update may be: the checks shared by the kernels and by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from .rounding import StochasticRounding


def check_weight(weight: float | Tensor) -> None:
    """Refuse a weight that is no weight of an average.

    Args:
        weight: a number, or a tensor, whose value is not read.

    Raises:
        ValueError: a number outside [0, 1] or NaN; a tensor that is not 0-dimensional or not floating.
        TypeError: anything else.
    """
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or not weight.is_floating_point():
            raise ValueError(
                "weight must be a float or a 0-dimensional floating tensor, "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
    elif not isinstance(weight, Real):
        raise TypeError(f"weight must be a float or a 0-dimensional floating tensor, got {type(weight).__name__}")
    elif not 0.0 <= float(weight) <= 1.0:
        raise ValueError(f"weight must be in [0, 1], got {weight}")


def check_update(
    weights: Sequence[float] | Tensor, count: int, rounding: StochasticRounding | None, skip: Tensor | None
) -> None:
    """Refuse numbers that are no update of `count` averages of each source.

    Args:
        weights: numbers, or a tensor of one dimension, whose values are not read.
        count: how many averages follow each source.
        rounding: of the averages, or None.
        skip: a flag, whose value is not read, or None.

    Raises:
        ValueError: another number of weights; a number outside [0, 1] or NaN; weights in a tensor that is not floating;
            a flag of more than one element.
        TypeError: anything else.
    """
    expected = f"weights must be {count} floats in [0, 1] or a floating tensor of shape ({count},)"
    if isinstance(weights, Tensor):
        if weights.shape != (count,) or not weights.is_floating_point():
            raise ValueError(f"{expected}, got {weights.dtype} of shape {tuple(weights.shape)}")
    elif not isinstance(weights, Sequence) or not all(isinstance(weight, Real) for weight in weights):
        raise TypeError(f"{expected}, got {weights!r}")
    elif len(weights) != count or not all(0.0 <= float(weight) <= 1.0 for weight in weights):
        raise ValueError(f"{expected}, got {weights!r}")
    if rounding is not None and not isinstance(rounding, StochasticRounding):
        raise TypeError(f"rounding must be a StochasticRounding or None, got {type(rounding).__name__}")
    if skip is not None:
        if not isinstance(skip, Tensor) or skip.is_complex():
            raise TypeError("skip must be a real tensor of one element or None")
        if skip.numel() != 1:
            raise ValueError(f"skip must have one element, got shape {tuple(skip.shape)}")
