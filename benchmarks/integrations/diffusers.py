"""diffusers' average of a model's parameters, as its training scripts update it after each step of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers import Prepared


def _prepared(each: Any, model: nn.Module) -> Prepared:
    average = each(model.parameters(), decay=0.9999)
    names = [name for name, _ in model.named_parameters()]
    return Prepared(
        lambda: average.step(model.parameters()), lambda: [dict(zip(names, average.shadow_params, strict=True))]
    )


def original(model: nn.Module) -> Prepared:
    """The library's own update of an average of the model."""
    from diffusers.training_utils import EMAModel

    return _prepared(EMAModel, model)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.diffusers import EMAModel

    return _prepared(EMAModel, model)
