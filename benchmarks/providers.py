"""What is timed against what: one small function for each way to update an average.

A provider prepares everything that a training loop would keep between steps, and returns the call that the loop makes
after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa

DECAY = 0.9
"""Of the moving averages. It costs no time; at 0.999 a bfloat16 average would not move and could not be checked."""

COPY_LIMIT = 8 << 30
"""Bytes: beyond it a GPU's copy is of the same speed, and Llama's would not fit beside the averages."""
ADD_LIMIT = 2 << 30
"""Bytes: beyond it a CPU's sum is of the same speed, and several averages leave less memory for it."""

Weight = Callable[[int], float]
"""The weight of the model that follows n others, n >= 1."""
Averages = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Gives each average and its buffers under the model's names, one after another: they may be copies."""


@dataclass(frozen=True)
class Plan:
    """What is averaged in one comparison.

    Args:
        name: as it stands in the results.
        source: of the model that is trained.
        average: of the averages.
        averages: how many are kept.
        stochastic: whether the comparison is of stochastic rounding.
    """

    name: str
    source: torch.dtype
    average: torch.dtype
    averages: int = 1
    stochastic: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("fp32", torch.float32, torch.float32),
        Plan("mixed", torch.bfloat16, torch.float32),
        Plan("bf16", torch.bfloat16, torch.bfloat16),
        Plan("fp32_k2", torch.float32, torch.float32, averages=2),
        Plan("fp32_k4", torch.float32, torch.float32, averages=4),
        Plan("bf16_stochastic", torch.bfloat16, torch.bfloat16, stochastic=True),
    )
}


def update_bytes(model: nn.Module, plan: Plan) -> int:
    """The bytes that an update must move, each tensor once.

    Args:
        model: the source of the average.
        plan: the dtypes, and how many averages.

    Returns:
        Read source, read and write each average for parameters; read and write for buffers, which are copied once.
    """
    written = plan.averages * plan.average.itemsize
    parameters = sum(tensor.nbytes + 2 * tensor.numel() * written for tensor in model.parameters())
    buffers = sum(
        tensor.nbytes + (tensor.numel() * plan.average.itemsize if tensor.is_floating_point() else tensor.nbytes)
        for tensor in model.buffers()
    )
    return parameters + buffers


@dataclass(frozen=True)
class Prepared:
    """A provider, ready for one model.

    Args:
        update: takes the model's present weights into the averages.
        averages: gives them; None where there are none, as for the ceiling.
        part: of the update's bytes that `update` moves; times are divided by it.
    """

    update: Callable[[], object]
    averages: Averages | None
    part: float = 1.0


@dataclass(frozen=True)
class Provider:
    """A way to update an average.

    Args:
        setup: prepares it for a model.
        weights: of each average, those beyond the plan's number unused; none for the ceiling, which averages nothing.
        ours: whether its result is fastswa's responsibility.
        stochastic: whether its rounding is.
    """

    setup: Callable[[nn.Module, Plan], Prepared]
    weights: tuple[Weight, ...]
    ours: bool = False
    stochastic: bool = False


def held_by(module: nn.Module) -> Averages:
    """The average that a module holds.

    Args:
        module: of averages, with the model's names.
    """
    return lambda: [dict([*module.named_parameters(), *module.named_buffers()])]


def _swa(n: int) -> float:
    return 1 / (n + 1)


def _ema(n: int) -> float:
    return 1 - DECAY


def _torch_default(model: nn.Module, plan: Plan) -> Prepared:
    average = swa_utils.AveragedModel(model).to(plan.average)
    return Prepared(partial(average.update_parameters, model), held_by(average.module))


def _torch_ema_multi(model: nn.Module, plan: Plan) -> Prepared:
    function = swa_utils.get_ema_multi_avg_fn(DECAY)
    average = swa_utils.AveragedModel(model, multi_avg_fn=function).to(plan.average)
    return Prepared(partial(average.update_parameters, model), held_by(average.module))


def _cached_foreach(model: nn.Module, plan: Plan) -> Prepared:
    averaged = deepcopy(model).to(plan.average)
    averages = [tensor.detach() for tensor in averaged.parameters()]
    sources = [tensor.detach() for tensor in model.parameters()]
    copy_to, copy_from = list(averaged.buffers()), list(model.buffers())

    def update() -> None:
        torch._foreach_lerp_(averages, sources, 1 - DECAY)
        if copy_to:
            torch._foreach_copy_(copy_to, copy_from)

    return Prepared(update, held_by(averaged))


def _fastswa(model: nn.Module, plan: Plan) -> Prepared:
    average = fastswa.AveragedModel(model, dtype=plan.average)
    return Prepared(partial(average.update_parameters, model), held_by(average.module))


def _fastswa_ema(model: nn.Module, plan: Plan) -> Prepared:
    average = fastswa.AveragedModel(model, multi_avg_fn=fastswa.EMA(DECAY), dtype=plan.average)
    return Prepared(partial(average.update_parameters, model), held_by(average.module))


def ceiling(model: nn.Module, plan: Plan) -> Prepared:
    """What the machine needs to move an update's bytes: `x.add_(y)` on a CPU, a copy on a GPU.

    Args:
        model: the source of the averages.
        plan: the dtypes, and how many averages.
    """
    size = update_bytes(model, plan)
    device = next(model.parameters()).device
    if device.type == "cpu":
        # 12 bytes an element: x is read and written, y is read.
        added = min(size, ADD_LIMIT)
        x, y = torch.ones(added // 12), torch.ones(added // 12)
        return Prepared(partial(x.add_, y), None, added / size)
    copied = min(size, COPY_LIMIT)
    source, target = (torch.ones(copied // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return Prepared(partial(target.copy_, source), None, copied / size)


OURS = "fastswa AveragedModel"
TORCH = "torch AveragedModel"
CACHED = "cached _foreach_lerp_"
CEILING = "ceiling"

PROVIDERS: dict[str, Provider] = {
    OURS: Provider(_fastswa, (_swa,), ours=True),
    f"{OURS}, EMA": Provider(_fastswa_ema, (_ema,), ours=True),
    TORCH: Provider(_torch_default, (_swa,)),
    f"{TORCH}, get_ema_multi_avg_fn": Provider(_torch_ema_multi, (_ema,)),
    CACHED: Provider(_cached_foreach, (_ema,)),
    CEILING: Provider(ceiling, ()),
}
"""Of one average, by the names in the results; the others' times are compared with the first's.

The ceiling is `x.add_(y)` on a CPU, a device-to-device copy on a GPU.
"""
