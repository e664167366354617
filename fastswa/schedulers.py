"""Learning-rate schedules for weight averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

__all__ = ["SWALR", "CyclicalSWALR"]

Shape = Literal["linear", "cosine", "triangular"]


class CyclicalSWALR(LRScheduler):
    r"""The paper's cyclical learning rate: down from a high to a low rate in each cycle, then a jump back.

    In iteration :math:`i = 1, 2, \dots` the rate is

    .. math::
        \alpha(i) = (1 - t(i))\, \alpha_1 + t(i)\, \alpha_2, \qquad
        t(i) = \tfrac{1}{c} \left( ((i - 1) \bmod c) + 1 \right)

    for "linear". With the same t, "cosine" is :math:`\alpha_2 + \frac{1}{2} (\alpha_1 - \alpha_2)(1 + \cos \pi t)`, and
    "triangular" goes down until :math:`t = \frac{1}{2}`, then up: :math:`\alpha_2 + (\alpha_1 - \alpha_2) |2t - 1|`.

    `step` belongs after every iteration, not every epoch. Like torch's CyclicLR, the schedule sets the rates as soon as
    it is made: make it when the averaging phase begins.

    Args:
        optimizer: whose parameter groups get the rates.
        lr_max: :math:`\alpha_1`, 0 or more: one for all groups, or one for each. A group that is added later gets the
            rates of the last one, unless its own are appended to the lists `lr_max` and `lr_min`.
        lr_min: :math:`\alpha_2`, between 0 and `lr_max`; likewise.
        cycle_length: :math:`c`, in iterations; even for "triangular". 1 is a constant rate, `lr_min`.
        shape: "linear" as in the paper, "cosine" as in SGDR, or "triangular" as in Fast Geometric Ensembling.
        last_epoch: iterations that were made before, less one, as in torch's schedulers: -1 at the start.

    Raises:
        ValueError: rates, a cycle length or a shape that can't be; says which.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> scheduler, swa_model = CyclicalSWALR(optimizer, 0.5, 0.1, cycle_length=2), AveragedModel(model)
        >>> for iteration in range(4):
        ...     optimizer.step()
        ...     print(optimizer.param_groups[0]["lr"])
        ...     if scheduler.collect:
        ...         swa_model.update_parameters(model)
        ...     scheduler.step()
        0.3
        0.1
        0.3
        0.1
        >>> swa_model.n_averaged
        tensor(2)

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.1.
        Loshchilov and Hutter 2017, SGDR: Stochastic Gradient Descent with Warm Restarts, equation 5.
        Garipov et al. 2018, Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, section 5.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_max: float | Sequence[float],
        lr_min: float | Sequence[float],
        cycle_length: int,
        shape: Shape = "linear",
        last_epoch: int = -1,
    ) -> None:
        if shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {get_args(Shape)}, got {shape!r}")
        if not isinstance(cycle_length, int) or isinstance(cycle_length, bool) or cycle_length < 1:
            raise ValueError(f"cycle_length must be a number of iterations, 1 or more, got {cycle_length!r}")
        if shape == "triangular" and cycle_length % 2:
            raise ValueError(f"cycle_length must be even for shape='triangular', got {cycle_length}")
        groups = len(optimizer.param_groups)
        self.lr_max, self.lr_min = _rates("lr_max", lr_max, groups), _rates("lr_min", lr_min, groups)
        for index, (high, low) in enumerate(zip(self.lr_max, self.lr_min, strict=True)):
            if not (0 <= low <= high < math.inf):
                raise ValueError(
                    f"0 <= lr_min <= lr_max must hold, got lr_min={low} and lr_max={high} for parameter group {index}"
                )
        self.cycle_length = cycle_length
        self.shape = shape
        super().__init__(optimizer, last_epoch)

    @property
    def collect(self) -> bool:
        """Whether to average the model after this iteration's `optimizer.step()`: its rate is the cycle's lowest.

        Look before `step()`, which goes on to the next iteration. For "linear" and "cosine" this is the cycle's last
        iteration (i mod c = 0), for "triangular" the one in its middle.
        """
        position = self.last_epoch % self.cycle_length + 1
        return position == (self.cycle_length // 2 if self.shape == "triangular" else self.cycle_length)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the present iteration, one for each parameter group."""
        t = (self.last_epoch % self.cycle_length + 1) / self.cycle_length
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        elif self.shape == "triangular":
            t = 1 - abs(2 * t - 1)
        last = len(self.lr_max) - 1, len(self.lr_min) - 1
        return [
            (1 - t) * self.lr_max[min(index, last[0])] + t * self.lr_min[min(index, last[1])]
            for index in range(len(self.optimizer.param_groups))
        ]


def _rates(name: str, rates: float | Sequence[float], groups: int) -> list[float]:
    if not isinstance(rates, Sequence):
        return [float(rates)] * groups
    if len(rates) != groups:
        raise ValueError(f"{name} has {len(rates)} rates for {groups} parameter groups; give one, or one for each")
    return [float(rate) for rate in rates]
