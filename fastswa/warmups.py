"""Warm-ups: how the decay of an EMA grows from the first models on, as other libraries have it.

In each, n counts the models that the average holds already, the copied first one included. Libraries whose average
starts as a copy of the model at construction (torch_ema, ultralytics, torchtitan) count that copy as the first model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Warmup:
    """A decay that depends on how many models came before."""

    def decay(self, n: int | Tensor, target: float) -> Any:
        """The decay for the next model.

        Args:
            n: how many models the average holds already, at least 1: an int, or a 0-dimensional floating tensor, which
                is not read by the host.
            target: the decay of the EMA, in [0, 1], that the warm-up leads to.

        Returns:
            A decay in [0, 1]: a float, or a 0-dimensional tensor where n is one.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RatioWarmup(Warmup):
    r"""The decay grows as a ratio of counts, from 2/11 for the second model towards 1.

    .. math:: d(n) = \max\left(d_{\min}, \min\left(d, \frac{1 + s}{10 + s}\right)\right), \qquad s = n - u

    and 0 while :math:`s \le 0`, so that the newest model is copied.

    Args:
        min_decay: lower bound of the decay after `update_after_step`, in [0, 1]. Only diffusers has it.
        update_after_step: u, models that are copied after the first, at least 0. Only diffusers has it.

    Raises:
        ValueError: a value out of its range, or NaN.

    Example:
        >>> RatioWarmup().decay(8, target=0.999)
        0.5

    References:
        torch_ema 0.3, torch_ema/ema.py, ExponentialMovingAverage.update: n is its num_updates, advanced before use;
        diffusers 0.42, training_utils.py, EMAModel.get_decay without use_ema_warmup: n is optimization_step - 1;
        both from TensorFlow's ExponentialMovingAverage with num_updates.
    """

    min_decay: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        _check_bounds(self.min_decay, self.update_after_step)

    def decay(self, n: int | Tensor, target: float) -> Any:
        step = _at_least(n - self.update_after_step, 0)
        # The comparison is a factor of 0 or 1, which serves numbers and tensors alike.
        return (step > 0) * _at_least(_at_most((1 + step) / (10 + step), target), self.min_decay)


@dataclass(frozen=True)
class InversePowerWarmup(Warmup):
    r"""The decay approaches 1 by an inverse power of the step.

    .. math:: d(n) = \max\left(d_{\min}, \min\left(d, 1 - (1 + s / \gamma)^{-p}\right)\right), \qquad s = n - u

    and 0 while :math:`s \le 0`, so that the newest model is copied. With :math:`\gamma = 1`, power 2/3 reaches a decay
    of 0.999 at 31 600 models and 3/4 at 10 000; power 1 with a decay of 1 is the equal average.

    Args:
        inv_gamma: gamma, above 0; larger is slower. timm calls it warmup_gamma.
        power: p, above 0. timm calls it warmup_power.
        min_decay: lower bound of the decay after `update_after_step`, in [0, 1]. ema-pytorch calls it min_value.
        update_after_step: u, models that are copied after the first, at least 0.

    Raises:
        ValueError: a value out of its range, or NaN.

    Example:
        >>> InversePowerWarmup(power=1.0).decay(3, target=0.999)
        0.75

    References:
        timm 1.0.31, utils/model_ema.py, ModelEmaV3.get_decay with use_warmup: n is step - 1;
        diffusers 0.42, training_utils.py, EMAModel.get_decay with use_ema_warmup: n is optimization_step - 1;
        ema-pytorch 0.8.3, ema_pytorch.py, EMA.get_current_decay with update_every=1: n is the calls before this one.
        With update_every=k, divide inv_gamma and update_after_step by k. All three credit Katherine Crowson.
    """

    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        _check_positive("inv_gamma", self.inv_gamma)
        _check_positive("power", self.power)
        _check_bounds(self.min_decay, self.update_after_step)

    def decay(self, n: int | Tensor, target: float) -> Any:
        step = _at_least(n - self.update_after_step, 0)
        growing = 1 - (1 + step / self.inv_gamma) ** -self.power
        return (step > 0) * _at_least(_at_most(growing, target), self.min_decay)


@dataclass(frozen=True)
class ExponentialWarmup(Warmup):
    r"""The decay approaches its target exponentially.

    .. math:: d(n) = d \left(1 - e^{-(n + o) / \tau}\right)

    Args:
        tau: models after which 63 % of the target are reached, above 0.
        offset: o, at least 0: what the library adds to n.

    Raises:
        ValueError: a value out of its range, or NaN.

    Example:
        >>> round(ExponentialWarmup(tau=2000).decay(2000, target=1.0), 3)
        0.632

    References:
        ultralytics 8.4, utils/torch_utils.py, ModelEMA: offset 0; n is its updates, advanced before use;
        mmdetection 3.3, mmdet/models/layers/ema.py, ExpMomentumEMA (on mmengine's base class): offset 1, tau is its
        gamma, the decay 1 - momentum; n is its steps.
    """

    tau: float = 2000.0
    offset: int = 0

    def __post_init__(self) -> None:
        _check_positive("tau", self.tau)
        if not self.offset >= 0:
            raise ValueError(f"offset must be at least 0, got {self.offset}")

    def decay(self, n: int | Tensor, target: float) -> Any:
        exponent = -(n + self.offset) / self.tau
        return target * (1 - (exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)))


@dataclass(frozen=True)
class AnnealingWarmup(Warmup):
    r"""The weight of a new model falls hyperbolically.

    .. math:: 1 - d(n) = \max\left(1 - d, \frac{\gamma}{\gamma + n}\right)

    Args:
        gamma: models after which a new one weighs 1/2, above 0. 1 gives the equal average until the target is reached.

    Raises:
        ValueError: gamma not above 0, or NaN.

    Example:
        >>> AnnealingWarmup(gamma=100).decay(300, target=0.999)
        0.75

    References:
        mmengine 0.10.7, model/averaged_model.py, MomentumAnnealingEMA: decay is 1 - momentum; n is its steps with
        interval=1. With interval=k, divide gamma by k.
    """

    gamma: float = 100.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def decay(self, n: int | Tensor, target: float) -> Any:
        return _at_most(n / (self.gamma + n), target)


@dataclass(frozen=True)
class HalfLifeWarmup(Warmup):
    r"""The half-life of a model's weight is a fraction of the models so far.

    .. math:: d(n) = \min\left(d, 2^{-1 / (f n)}\right)

    torchtitan has no upper bound: `EMA(1.0, warmup=HalfLifeWarmup(f))` is its rule.

    Args:
        fraction: f, above 0. 0.05 remembers about the last twentieth of the run.

    Raises:
        ValueError: a fraction not above 0, or NaN.

    Example:
        >>> HalfLifeWarmup(fraction=0.25).decay(4, target=1.0)
        0.5

    References:
        torchtitan, components/ema.py, EMAOptimizersContainer._decay_at (pull request 3985): n is its num_updates.
    """

    fraction: float = 0.05

    def __post_init__(self) -> None:
        _check_positive("fraction", self.fraction)

    def decay(self, n: int | Tensor, target: float) -> Any:
        return _at_most(2.0 ** (-1 / (self.fraction * n)), target)


def _at_most(value: Any, bound: float) -> Any:
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def _at_least(value: Any, bound: float) -> Any:
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


# The comparisons are negated, so that NaN is refused too.
def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def _check_bounds(min_decay: float, update_after_step: int) -> None:
    if not 0.0 <= min_decay <= 1.0:
        raise ValueError(f"min_decay must be in [0, 1], got {min_decay}")
    if not update_after_step >= 0:
        raise ValueError(f"update_after_step must be at least 0, got {update_after_step}")
