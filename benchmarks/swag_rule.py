"""SWAG's moments: fastswa's, and the rule as its authors published it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastswa
from benchmarks.providers import CEILING, NO_BUFFERS, Averages, Exact, Plan, Prepared, Provider, ceiling

RANK = 20
"""Deviations kept, all of them before the first update that counts."""


def _filled(collect: Callable[[], object], averages: Averages) -> Prepared:
    for _ in range(RANK):
        collect()
    return Prepared(collect, averages)


def _signed(variance: Tensor, weight: Tensor) -> Tensor:
    """A standard deviation with the sign of the present weight, so that it is one multiple of all weights."""
    return variance.sqrt().copysign(weight.detach())


def _fastswa(model: nn.Module, plan: Plan) -> Prepared:
    swag = fastswa.SWAG(model, rank=RANK, dtype=plan.average)

    def averages() -> Iterator[Mapping[str, Tensor]]:
        state = swag.state_dict()
        yield state["mean"]
        yield {name: _signed(state["variance"][name], weight) for name, weight in model.named_parameters()}
        oldest = swag.n_averaged % RANK
        yield from (*state["deviations"][oldest:], *state["deviations"][:oldest])

    return _filled(swag.collect, averages)


def _published(model: nn.Module, plan: Plan) -> Prepared:
    """Mean, mean of squares, and deviations in a matrix that grows by a row and loses one, tensor by tensor."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    n = torch.zeros(1, dtype=torch.int64, device=next(iter(weights.values())).device)
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    rows = {name: weight.new_empty(0, weight.numel()) for name, weight in weights.items()}

    def collect() -> None:
        for name, weight in weights.items():
            mean[name] = mean[name] * n.item() / (n.item() + 1) + weight / (n.item() + 1)
            square[name] = square[name] * n.item() / (n.item() + 1) + weight**2 / (n.item() + 1)
            rows[name] = torch.cat((rows[name], (weight - mean[name]).view(1, -1)))
            if n.item() + 1 > RANK:
                rows[name] = rows[name][1:]
        n.add_(1)

    def averages() -> Iterator[Mapping[str, Tensor]]:
        yield mean
        yield {name: _signed(square[name] - mean[name] ** 2, weight) for name, weight in weights.items()}
        for row in range(RANK):
            yield {name: rows[name][row].view_as(weight) for name, weight in weights.items()}

    return _filled(collect, averages)


def _mean(models: Sequence[float]) -> float:
    return sum(models) / len(models)


def _standard_deviation(models: Sequence[float]) -> float:
    """With the sign of the last model, as `_signed` gives it."""
    mean = _mean(models)
    return math.copysign(math.sqrt(_mean([(model - mean) ** 2 for model in models])), models[-1])


def _deviation(models: Sequence[float], row: int) -> float:
    """Of one of the last models from the mean that already holds it."""
    until = models[: len(models) - RANK + row + 1]
    return until[-1] - _mean(until)


MOMENTS: tuple[Exact, ...] = (
    _mean,
    _standard_deviation,
    *(partial(_deviation, row=row) for row in range(RANK)),
)

OUR_SWAG = "fastswa SWAG"
PUBLISHED = "SWAG's published rule"

SWAGS: dict[str, Provider] = {
    OUR_SWAG: Provider(_fastswa, MOMENTS, ours=True, buffers=NO_BUFFERS, before=RANK),
    PUBLISHED: Provider(_published, MOMENTS, buffers=NO_BUFFERS, before=RANK),
    CEILING: Provider(ceiling, ()),
}
"""Of the plan of SWAG."""
