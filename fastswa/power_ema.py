"""PowerEMA: the exponential moving average whose memory grows with the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastswa.rules import Rule


def gamma_of(gamma: float | None, sigma_rel: float | None) -> float:
    r"""The exponent of a power-function average, given itself or by the relative width of its profile.

    The largest root of :math:`(\gamma + 2)^2 (\gamma + 3) = (\gamma + 1)\,\sigma_\mathrm{rel}^{-2}`.

    Args:
        gamma: at least 0; or None.
        sigma_rel: the standard deviation of the profile as a share of the run, in (0, 0.2887]; or None.

    Returns:
        gamma.

    Raises:
        TypeError: both given, or none.
        ValueError: a value out of its range, or NaN.

    Example:
        >>> round(gamma_of(None, sigma_rel=0.1), 2)
        6.94

    References:
        Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, equation 126 and
        Algorithm 2.
    """
    if (gamma is None) == (sigma_rel is None):
        raise TypeError(f"give one of gamma and sigma_rel, got gamma={gamma}, sigma_rel={sigma_rel}")
    if gamma is not None:
        # Negated, so that NaN is refused too.
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")
        return float(gamma)
    assert sigma_rel is not None
    if not 0.0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel must be in (0, 12^-0.5 = 0.2887], got {sigma_rel}")
    square = float(sigma_rel) ** -2
    # At the upper end the root is 0, which rounding may take below.
    return max(0.0, float(np.roots([1, 7, 16 - square, 12 - square]).real.max()))


@dataclass(frozen=True, repr=False, init=False)
class PowerEMA(Rule):
    r"""Power-function average: an EMA whose memory is a fixed share of the run, whatever its length.

    .. math:: w(n) = 1 - \left(\frac{n}{n + 1}\right)^{\gamma + 1}

    The weight of a model taken at time t grows as :math:`t^\gamma`, so that early models are forgotten. gamma 0 is the
    equal average. From a few stored averages of two widths `synthesize` makes any other width afterwards.

    Args:
        gamma: at least 0. Give either this or `sigma_rel`.
        sigma_rel: the standard deviation of the profile as a share of the run, in (0, 0.2887]. The paper uses 0.05 and
            0.10.

    Raises:
        TypeError: both given, or none.
        ValueError: a value out of its range, or NaN.

    Example:
        >>> PowerEMA(gamma=1.0).weight(1)
        0.75
        >>> round(PowerEMA(sigma_rel=0.05).gamma, 2)
        16.97

    References:
        Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, equations 121 to 127;
        ema-pytorch 0.8.3, post_hoc_ema.py, KarrasEMA, whose decay is one model ahead, ((n + 1) / (n + 2))^(gamma + 1):
        as if the first model were taken twice.
    """

    gamma: float

    def __init__(
        self,
        *,
        gamma: float | None = None,
        sigma_rel: float | None = None,
        start: int = 0,
        every: int = 1,
        include_start: bool = False,
    ) -> None:
        # A frozen dataclass with its own __init__, so that `gamma` is there however it was given.
        values = {"gamma": gamma_of(gamma, sigma_rel), "start": start, "every": every, "include_start": include_start}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def sigma_rel(self) -> float:
        """The standard deviation of the profile as a share of the run (equation 123)."""
        return math.sqrt((self.gamma + 1) / (self.gamma + 3)) / (self.gamma + 2)

    def weight(self, n: int | Tensor) -> Any:
        return 1 - (n / (n + 1)) ** (self.gamma + 1)
