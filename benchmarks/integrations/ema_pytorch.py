"""ema-pytorch's average of a model, averaged at every call, as its README calls it after each step of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers import Prepared, held_by


def _prepared(each: Any, model: nn.Module) -> Prepared:
    average = each(model, beta=0.9999, update_after_step=0, update_every=1)
    return Prepared(average.update, held_by(average.ema_model))


def original(model: nn.Module) -> Prepared:
    """The library's own update of an average of the model."""
    from ema_pytorch import EMA

    return _prepared(EMA, model)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.ema_pytorch import EMA

    return _prepared(EMA, model)
