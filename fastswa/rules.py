"""What weight a model gets in the average: pure functions of how many models came before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils

from fastswa import backends


@dataclass(frozen=True)
class Rule:
    r"""A running average, defined by the weight of each new model.

    .. math:: a_0 = p_0, \qquad a_n = a_{n-1} + w(n) (p_n - a_{n-1})

    A rule is also a `multi_avg_fn`: torch's own AveragedModel, and any code with that convention, can call it.
    """

    def weight(self, n: int | Tensor) -> Any:
        """The weight of the next model.

        Args:
            n: how many models the average holds already, at least 1 (the first model is copied): an int, or a
                0-dimensional tensor, which is then not read by the host.

        Returns:
            A weight in [0, 1]: a float, or a 0-dimensional tensor where it depends on a tensor.
        """
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: int | Tensor) -> None:
        """Update lists of tensors, by torch's `multi_avg_fn` convention.

        Args:
            averaged: the averages, on one device and of one dtype; written.
            current: the model's tensors, in the same order.
            num_averaged: models in the average already, at least 1. A CUDA tensor is not read by the host.
        """
        if isinstance(num_averaged, Tensor):
            # float64, because float32 can't count past 2^24 models.
            num_averaged = num_averaged.double() if num_averaged.is_cuda else int(num_averaged)
        backends.lerp_lists_(averaged, current, self.weight(num_averaged))


@dataclass(frozen=True)
class SWA(Rule):
    r"""Stochastic Weight Averaging: the equal average of all models.

    .. math:: w(n) = \frac{1}{n + 1}

    The first model replaces the average's initial values, as in torch and in the authors' code; Algorithm 1 of the
    paper counts the starting point as a model too.

    Example:
        >>> SWA().weight(3)
        0.25

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """

    def weight(self, n: int | Tensor) -> Any:
        return 1 / (n + 1)


@dataclass(frozen=True)
class EMA(Rule):
    r"""Exponential moving average with a fixed decay.

    .. math:: w(n) = 1 - d

    Args:
        decay: d in [0, 1], for each update. 0.999 remembers about 1000 updates.

    Raises:
        ValueError: a decay outside [0, 1], or NaN.

    Example:
        >>> EMA(decay=0.75).weight(10)
        0.25

    References:
        Polyak and Juditsky 1992, Acceleration of Stochastic Approximation by Averaging, for the averaging;
        torch.optim.swa_utils.get_ema_multi_avg_fn for this form.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        # Negated, so that NaN is refused too.
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")

    def weight(self, n: int | Tensor) -> Any:
        return 1 - self.decay


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


def recognise(function: object) -> Rule | None:
    """The rule that a `multi_avg_fn` or `avg_fn` stands for.

    Args:
        function: a Rule, a closure made by one of torch's `get_*_avg_fn` factories, anything else, or None.

    Returns:
        The rule; SWA for None, torch's default; None for a function of the user's own.

    Raises:
        ValueError: one of torch's closures with a NaN decay.

    Example:
        >>> recognise(torch.optim.swa_utils.get_ema_avg_fn(0.9))
        EMA(decay=0.9)
    """
    if function is None:
        return SWA()
    if isinstance(function, Rule):
        return function
    if getattr(function, "__module__", None) != swa_utils.__name__:
        return None
    closure = inspect.unwrap(function)  # type: ignore[arg-type]
    name = getattr(closure, "__qualname__", "")
    if name in ("get_swa_avg_fn.<locals>.swa_update", "get_swa_multi_avg_fn.<locals>.swa_update"):
        return SWA()
    if name in ("get_ema_avg_fn.<locals>.ema_update", "get_ema_multi_avg_fn.<locals>.ema_update"):
        return EMA(inspect.getclosurevars(closure).nonlocals["decay"])
    return None
