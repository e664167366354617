"""torch's factories of averaging functions, whose results AveragedModel recognises and fuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import swa_utils

from fastswa.rules import EMA, SWA

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]


def get_ema_multi_avg_fn(decay: float = 0.999) -> EMA:
    """The exponential moving average as a `multi_avg_fn`.

    Args:
        decay: in [0, 1], for each update.

    Returns:
        `EMA(decay)`.

    Raises:
        ValueError: a decay outside [0, 1], or NaN.

    Example:
        >>> get_ema_multi_avg_fn(0.9)
        EMA(decay=0.9)
    """
    return EMA(decay)


def get_swa_multi_avg_fn() -> SWA:
    """The equal average as a `multi_avg_fn`.

    Returns:
        `SWA()`.

    Example:
        >>> get_swa_multi_avg_fn()
        SWA()
    """
    return SWA()


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """The exponential moving average as an `avg_fn`: torch's function, which AveragedModel recognises and fuses.

    Args:
        decay: in [0, 1], for each update.

    Returns:
        A function of (averaged, current, num_averaged) that returns a new tensor.

    Raises:
        ValueError: a decay outside [0, 1], or NaN.

    Example:
        >>> get_ema_avg_fn(0.75)(torch.zeros(1), torch.ones(1), 1)
        tensor([0.2500])
    """
    # torch lets NaN through.
    function: AvgFn = swa_utils.get_ema_avg_fn(EMA(decay).decay)  # type: ignore[no-untyped-call]
    return function


def get_swa_avg_fn() -> AvgFn:
    """The equal average as an `avg_fn`: torch's function, which AveragedModel recognises and fuses.

    Returns:
        A function of (averaged, current, num_averaged) that returns a new tensor.

    Example:
        >>> get_swa_avg_fn()(torch.zeros(1), torch.ones(1), 3)
        tensor([0.2500])
    """
    function: AvgFn = swa_utils.get_swa_avg_fn()  # type: ignore[no-untyped-call]
    return function
