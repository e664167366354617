"""torch_ema's average of a model, as its README updates it after each step of the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.providers import Prepared


def _prepared(
    each: Any, model: nn.Module, decay: float = 0.995, dtype: torch.dtype | None = None, **options: Any
) -> Prepared:
    average = each(model.parameters(), decay=decay, **options)
    if dtype is not None:
        average.to(dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    return Prepared(average.update, lambda: iter([dict(zip(names, average.shadow_params, strict=True))]))


def original(model: nn.Module, **options: Any) -> Prepared:
    """The library's own update of an average of the model, with other options than `ours` where any are given."""
    from torch_ema import ExponentialMovingAverage

    return _prepared(ExponentialMovingAverage, model, **options)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.torch_ema import ExponentialMovingAverage

    return _prepared(ExponentialMovingAverage, model)
