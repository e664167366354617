"""timm's average of a model, as its task updates it after each step of the optimizer."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import nn

from benchmarks.providers import Prepared, held_by


def _prepared(each: Any, model: nn.Module, decay: float = 0.9998, **options: Any) -> Prepared:
    average = each(model, decay=decay, **options)
    # From the second step on the decay is constant.
    steps = count(2)
    return Prepared(lambda: average.update(model, step=next(steps)), held_by(average.module))


def original(model: nn.Module, **options: Any) -> Prepared:
    """The library's own update of an average of the model, with other options than `ours` where any are given."""
    from timm.utils import ModelEmaV3

    return _prepared(ModelEmaV3, model, **options)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.timm import ModelEmaV3

    return _prepared(ModelEmaV3, model)
