"""What is timed of WeightAverages: several averages in one pass, and stochastic rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

import fastswa
from benchmarks import torchvision_operators
from benchmarks.providers import CEILING, DECAY, Averages, Plan, Prepared, Provider, averaged, ceiling, held_by

DECAYS = (DECAY, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of several averages: different ones, so that the check notices averages that took each other's weights."""


def _emas(plan: Plan) -> dict[str, fastswa.EMA]:
    return {f"ema{decay}": fastswa.EMA(decay) for decay in DECAYS[: plan.averages]}


def _constant(n: int, decay: float) -> float:
    return 1 - decay


EMAS = tuple(averaged(partial(_constant, decay=decay)) for decay in DECAYS)


def _kept(*all_averages: fastswa.WeightAverages) -> Averages:
    def averages() -> Iterator[Mapping[str, Tensor]]:
        for each in all_averages:
            yield from map(each.weights, each.rules)

    return averages


def _one_pass(model: nn.Module, plan: Plan) -> Prepared:
    averages = fastswa.WeightAverages(model, _emas(plan), dtype=plan.average)
    return Prepared(averages.update, _kept(averages))


def _passes(model: nn.Module, plan: Plan) -> Prepared:
    """As many WeightAverages as averages, each with its own copies of the buffers."""
    all_averages = [fastswa.WeightAverages(model, rule, dtype=plan.average) for rule in _emas(plan).values()]

    def update() -> None:
        for each in all_averages:
            each.update()

    return Prepared(update, _kept(*all_averages))


def _lists(model: nn.Module, plan: Plan) -> Prepared:
    """The buffers are copied once, as code written for several averages would."""
    sources = [tensor.detach() for tensor in model.parameters()]
    copy_from = list(model.buffers())
    copy_to = [buffer.clone() for buffer in copy_from]
    lists = [[source.to(plan.average, copy=True) for source in sources] for _ in range(plan.averages)]
    weights = [1 - decay for decay in DECAYS[: plan.averages]]

    def update() -> None:
        for own, weight in zip(lists, weights, strict=True):
            torch._foreach_lerp_(own, sources, weight)
        if copy_to:
            torch._foreach_copy_(copy_to, copy_from)

    def averages() -> Iterator[Mapping[str, Tensor]]:
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        for own in lists:
            yield dict(zip(names, (*own, *copy_to), strict=True))

    return Prepared(update, averages)


def _rounded(rounding: str, model: nn.Module, plan: Plan) -> Prepared:
    averages = fastswa.WeightAverages(model, fastswa.EMA(DECAY), dtype=plan.average, rounding=rounding)
    return Prepared(averages.update, _kept(averages))


def _timm(model: nn.Module, plan: Plan) -> Prepared:
    """timm's buffers are copied, as ours are; by default it averages them."""
    torchvision_operators.declare()
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(deepcopy(model), DECAY, stochastic_rounding=True, exclude_buffers=True)
    return Prepared(partial(average.update, model), held_by(average.module))


ONE_PASS = "fastswa WeightAverages, one pass"
PASSES = "fastswa WeightAverages, a pass each"
LISTS = "cached _foreach_lerp_, a list each"
STOCHASTIC = "fastswa WeightAverages, stochastic"
NEAREST = "fastswa WeightAverages, nearest"
TIMM = "timm ModelEmaV3, stochastic"

SEVERAL: dict[str, Provider] = {
    ONE_PASS: Provider(_one_pass, EMAS, ours=True),
    PASSES: Provider(_passes, EMAS, ours=True),
    LISTS: Provider(_lists, EMAS),
    CEILING: Provider(ceiling, ()),
}
"""Of the plans with several averages."""

ROUNDED: dict[str, Provider] = {
    STOCHASTIC: Provider(partial(_rounded, "stochastic"), EMAS, ours=True, stochastic=True),
    NEAREST: Provider(partial(_rounded, "nearest"), EMAS, ours=True),
    TIMM: Provider(_timm, EMAS, stochastic=True),
    CEILING: Provider(ceiling, ()),
}
"""Of the plan of stochastic rounding."""
