"""ultralytics' average of a model, as its trainer updates it after each step of the optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.providers import Prepared, held_by

UPDATES = 10_000
"""Made before, as in most of a training: the first thousand have weights near 1, which take another form of lerp."""


def _prepared(each: Any, model: nn.Module, **options: Any) -> Prepared:
    average = each(model, updates=UPDATES, **options)
    return Prepared(partial(average.update, model), held_by(average.ema))


def original(model: nn.Module, **options: Any) -> Prepared:
    """The library's own update of an average of the model, with other options than `ours` where any are given."""
    from ultralytics.utils.torch_utils import ModelEMA

    return _prepared(ModelEMA, model, **options)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.ultralytics import ModelEMA

    return _prepared(ModelEMA, model)
