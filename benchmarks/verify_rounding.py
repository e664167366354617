"""The gate for stochastic rounding, where no single result is right: each must be a neighbour of the exact value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.providers import Averages

DIGITS = 8
"""Of a bfloat16 in base 2, the leading one included."""
FLOAT32_ROUNDINGS = 5
"""As in `verify.tolerance`: near a bfloat16 they decide on which side of it the arithmetic ends."""
AWAY = (0.15, 0.35)
"""The share of results that are not the nearest neighbour: 1/4 for evenly spread values. Rounding to nearest gives 0,
and cutting off 1/2."""


class Step:
    """One update, seen from before it.

    Args:
        averages: of the provider; copied.
        weight: of the model that the update takes.
    """

    def __init__(self, averages: Averages, weight: float) -> None:
        self._averages, self._weight = averages, weight
        (before,) = averages()
        self._before = {name: tensor.detach().clone() for name, tensor in before.items()}

    def fault(self, model: nn.Module) -> str | None:
        """What is wrong with the update's result.

        Args:
            model: as the update took it.

        Returns:
            The verdict in words; None for a right result.
        """
        (after,) = self._averages()
        away, elements = 0, 0
        for name, source in model.named_parameters():
            result = after[name].detach()
            exact, slack = _exact(self._before[name], source.detach(), self._weight)
            if not _beside(result, exact, slack):
                return f"wrong: {name} is not rounded to a neighbour of the exact value"
            away += int((result != exact.to(result.dtype)).sum())
            elements += result.numel()
        if not AWAY[0] < away / elements < AWAY[1]:
            return f"wrong: {away / elements:.2g} of the results are not the nearest neighbour, 0.25 expected"
        return None


def _exact(before: Tensor, source: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The new average in float64, and how far float32 arithmetic may be from it."""
    exact = before.double().lerp_(source.double(), weight)
    slack = torch.maximum(before.abs(), source.abs()).double()
    return exact, slack.mul_(FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps)


def _beside(result: Tensor, exact: Tensor, slack: Tensor) -> bool:
    """Whether every result lies between the neighbours, which are included."""
    spacing = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - DIGITS)
    lower = exact.sub(slack).div_(spacing).floor_().mul_(spacing)
    upper = exact.add(slack).div_(spacing).ceil_().mul_(spacing)
    wide = result.double()
    # All, not any of the opposite, so that NaN is wrong too.
    return bool(((lower <= wide) & (wide <= upper)).all())
