"""An average in transformers' Trainer, which has none: torch's in a callback of one's own, and fastswa's."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.providers import Prepared, held_by

DECAY = 0.999


def original(model: nn.Module) -> Prepared:
    """What a callback of the user's own does with torch's class."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Prepared(lambda: average.update_parameters(model), held_by(average.module))


def ours(model: nn.Module) -> Prepared:
    """The event that the Trainer sends fastswa's callback."""
    from fastswa import EMA, WeightAverages
    from fastswa.integrations.transformers import WeightAveragingCallback

    callback = WeightAveragingCallback(EMA(DECAY))
    averages = callback.averages = WeightAverages(model, EMA(DECAY))
    return Prepared(lambda: callback.on_optimizer_step(None, None, None), lambda: [averages.weights()])
