"""Lightning's averaging callback, as its trainer calls it after each step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from benchmarks.providers import Prepared

PREFIX = "model."


def _prepared(
    make: Callable[..., Any],
    model: nn.Module,
    averages: Callable[[Any], Mapping[str, Tensor]],
    decay: float = 0.999,
) -> Prepared:
    from lightning.pytorch import LightningModule

    module = LightningModule()
    module.model = model
    module.to(next(model.parameters()).device)
    callback = make(decay=decay)
    trainer = SimpleNamespace(global_step=0)
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    def by_own_names() -> list[dict[str, Tensor]]:
        return [{name.removeprefix(PREFIX): tensor for name, tensor in averages(callback).items()}]

    return Prepared(update, by_own_names)


def original(model: nn.Module, decay: float = 0.999) -> Prepared:
    """The library's own update of an average of the model, with other options than `ours` where any are given."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return _prepared(EMAWeightAveraging, model, lambda callback: callback._average_model.module.state_dict(), decay)


def ours(model: nn.Module) -> Prepared:
    """The same with fastswa."""
    from fastswa.integrations.lightning import FastWeightAveraging

    return _prepared(FastWeightAveraging, model, lambda callback: callback.averages.weights())
