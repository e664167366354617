"""What weight a model gets in the average: pure functions of how many models came before."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils

from fastswa import backends
from fastswa.warmups import Warmup


@dataclass(frozen=True, repr=False)
class Rule:
    r"""A running average, defined by the weight of each new model.

    .. math:: a_0 = p_0, \qquad a_n = a_{n-1} + w(n) (p_n - a_{n-1})

    A rule is also a `multi_avg_fn`: torch's own AveragedModel, and any code with that convention, can call it. Those
    average at every call, so there the fields below keep their defaults; WeightAverages serves the others.

    Args:
        start: the first update call, counted from 0, that takes part.
        every: from `start` on, one call in so many takes part; at least 1.
        include_start: count the model as it is when the average is made as the first model. If not, the first update
            call that takes part replaces the average.

    Raises:
        ValueError: start or every that are no int or out of range.
    """

    start: int = field(default=0, kw_only=True)
    every: int = field(default=1, kw_only=True)
    include_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_integer("start", self.start, 0)
        check_integer("every", self.every, 1)

    def __repr__(self) -> str:
        shown = [part for part in fields(self) if not part.kw_only]
        shown += [part for part in fields(self) if part.kw_only and getattr(self, part.name) != part.default]
        return f"{type(self).__name__}({', '.join(f'{part.name}={getattr(self, part.name)!r}' for part in shown)})"

    @property
    def copies(self) -> int:
        """How many sets of the model's tensors the average keeps."""
        return 1

    def due(self, step: int | Tensor) -> Any:
        """Whether an update call takes part.

        Args:
            step: the call, counted from 0: an int, or a 0-dimensional tensor, which is not read by the host.

        Returns:
            A bool, or a 0-dimensional bool tensor where step is a tensor.

        Example:
            >>> [step for step in range(9) if SWA(start=2, every=3).due(step)]
            [2, 5, 8]
        """
        return (step >= self.start) & ((step - self.start) % self.every == 0)

    def weight(self, n: int | Tensor) -> Any:
        """The weight of the next model.

        Args:
            n: how many models the average holds already, at least 1 (the first model is copied): an int, or a
                0-dimensional tensor, which is then not read by the host.

        Returns:
            A weight in [0, 1]: a float, or a 0-dimensional tensor where it depends on a tensor.
        """
        raise NotImplementedError

    def copy_weights(self, n: int | Tensor) -> tuple[Any, ...]:
        """The weight with which each kept set of tensors moves towards the next model.

        Args:
            n: how many models were taken before, at least 0: an int, or a 0-dimensional tensor, which is not read by
                the host.

        Returns:
            `copies` weights in [0, 1], 1 for a copy: floats, or 0-dimensional float64 tensors where n is a tensor.
        """
        if isinstance(n, Tensor):
            # float64, because float32 can't count past 2^24 models.
            count = n.double()
            return (torch.where(count == 0, torch.ones_like(count), self.weight(count)),)
        return (1.0 if n == 0 else self.weight(n),)

    def mixture(self, n: int) -> tuple[float, ...]:
        """The coefficients by which the kept sets of tensors are combined into the average.

        Args:
            n: how many models were taken, at least 1.

        Returns:
            `copies` coefficients with the sum 1; 0 for a set that nothing has been written to yet.

        Raises:
            ValueError: n below 1: there is no average yet.
        """
        check_integer("n", n, 1)
        return (1.0,)

    def refusal(self) -> str | None:
        """Why the rule can't be a `multi_avg_fn`, in words; None if it can."""
        if self.copies != 1:
            return f"{self!r} keeps {self.copies} copies of the weights; use fastswa.WeightAverages"
        if (self.start, self.every, self.include_start) != (0, 1, False):
            return (
                f"{self!r} does not average exactly at every update call, as a multi_avg_fn does; "
                "use fastswa.WeightAverages, or call update_parameters only when it is due"
            )
        return None

    @torch.no_grad()
    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: int | Tensor) -> None:
        """Update lists of tensors, by torch's `multi_avg_fn` convention.

        Args:
            averaged: the averages, on one device and of one dtype; written.
            current: the model's tensors, in the same order.
            num_averaged: models in the average already, at least 1. A CUDA tensor is not read by the host.

        Raises:
            TypeError: a rule that does not average at every call or keeps several copies.
        """
        reason = self.refusal()
        if reason is not None:
            raise TypeError(reason)
        if isinstance(num_averaged, Tensor):
            # float64, because float32 can't count past 2^24 models.
            num_averaged = num_averaged.double() if num_averaged.is_cuda else int(num_averaged)
        backends.lerp_lists_(averaged, current, self.weight(num_averaged))


@dataclass(frozen=True, repr=False)
class SWA(Rule):
    r"""Stochastic Weight Averaging: the equal average of all models.

    .. math:: w(n) = \frac{1}{n + 1}

    The first model replaces the average's initial values, as in torch and in the authors' code. Algorithm 1 of the
    paper counts the starting point as a model too: that is `SWA(include_start=True)`.

    Example:
        >>> SWA().weight(3)
        0.25

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, Algorithm 1.
    """

    def weight(self, n: int | Tensor) -> Any:
        return 1 / (n + 1)


@dataclass(frozen=True, repr=False)
class EMA(Rule):
    r"""Exponential moving average with a fixed decay, or one that grows towards it.

    .. math:: w(n) = 1 - d \quad\text{or}\quad w(n) = 1 - d(n)

    Args:
        decay: d in [0, 1], for each update. 0.999 remembers about 1000 updates.
        warmup: how the decay grows at the start, such as `InversePowerWarmup()`; constant if left out.

    Raises:
        ValueError: a decay outside [0, 1], or NaN.
        TypeError: a warmup that is none.

    Example:
        >>> EMA(decay=0.75).weight(10)
        0.25

    References:
        Polyak and Juditsky 1992, Acceleration of Stochastic Approximation by Averaging, for the averaging;
        torch.optim.swa_utils.get_ema_multi_avg_fn for this form.
    """

    decay: float = 0.999
    warmup: Warmup | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Negated, so that NaN is refused too.
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")
        if self.warmup is not None and not isinstance(self.warmup, Warmup):
            raise TypeError(f"warmup must be a Warmup such as InversePowerWarmup(), got {self.warmup!r}")

    def weight(self, n: int | Tensor) -> Any:
        return 1 - (self.decay if self.warmup is None else self.warmup.decay(n, self.decay))


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


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no int or too small, by name.

    Args:
        name: of the parameter.
        value: to check.
        least: the smallest allowed.

    Raises:
        ValueError: not an int of at least `least`.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
