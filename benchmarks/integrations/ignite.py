"""ignite's averaging handler, as its engine calls it after each iteration."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.providers import Prepared, held_by


def _prepared(each: Any, model: nn.Module) -> Prepared:
    from ignite.engine import Engine, Events

    handler = each(model, momentum=0.0002)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    return Prepared(lambda: trainer.fire_event(Events.ITERATION_COMPLETED), held_by(handler.ema_model))


def original(model: nn.Module) -> Prepared:
    """The library's own update of an average of the model."""
    from ignite.handlers import EMAHandler

    return _prepared(EMAHandler, model)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.ignite import EMAHandler

    return _prepared(EMAHandler, model)
