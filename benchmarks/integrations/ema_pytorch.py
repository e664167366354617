"""ema-pytorch's average of a model, averaged at every call, as its README calls it after each step of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers import Prepared, held_by


def _prepared(each: Any, model: nn.Module, beta: float = 0.9999, **options: Any) -> Prepared:
    average = each(model, beta=beta, update_after_step=0, update_every=1, **options)
    return Prepared(average.update, held_by(average.ema_model))


def original(model: nn.Module, **options: Any) -> Prepared:
    """The library's own update of an average of the model, with other options than `ours` where any are given."""
    from ema_pytorch import EMA

    return _prepared(EMA, model, **options)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.ema_pytorch import EMA

    return _prepared(EMA, model)
