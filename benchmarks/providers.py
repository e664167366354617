"""What is timed against what: one small function for each way to update an average.

A provider prepares everything that a training loop would keep between steps, and returns the call that the loop makes
after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
Exact = Callable[[Sequence[float]], float]
"""What an average is of the weight that an element started from, given the models in units of that weight."""

COPIED = "buffers copied"
AVERAGED = "buffers averaged, integers copied"
LEFT = "buffers averaged, integers left as they were"
TRUNCATED = "buffers averaged, integers cut off to whole numbers"
NO_BUFFERS = "parameters only"
ONE_AVERAGE = ("fp32", "mixed", "bf16")


@dataclass(frozen=True)
class Plan:
    """What is averaged in one comparison.

    Args:
        name: as it stands in the results.
        source: of the model that is trained.
        average: of the averages.
        averages: how many are kept.
        stochastic: whether the comparison is of stochastic rounding.
        moments: whether it is of SWAG's mean, variance and deviations.
    """

    name: str
    source: torch.dtype
    average: torch.dtype
    averages: int = 1
    stochastic: bool = False
    moments: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("fp32", torch.float32, torch.float32),
        Plan("mixed", torch.bfloat16, torch.float32),
        Plan("bf16", torch.bfloat16, torch.bfloat16),
        Plan("fp32_k2", torch.float32, torch.float32, averages=2),
        Plan("fp32_k4", torch.float32, torch.float32, averages=4),
        Plan("bf16_stochastic", torch.bfloat16, torch.bfloat16, stochastic=True),
        Plan("swag", torch.float32, torch.float32, moments=True),
    )
}


def update_bytes(model: nn.Module, plan: Plan) -> int:
    """The bytes that an update must move, each tensor once.

    Args:
        model: the source of the average.
        plan: the dtypes, and how many averages.

    Returns:
        Read source, read and write each average for parameters; read and write for buffers, which are copied once. Of
        SWAG read source, read and write mean and variance, and write a deviation, for parameters alone.
    """
    if plan.moments:
        return sum(tensor.nbytes + 5 * tensor.numel() * plan.average.itemsize for tensor in model.parameters())
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
        exact: of each average, those beyond the plan's number unused; none for the ceiling, which averages nothing.
        ours: whether its result is fastswa's responsibility.
        stochastic: whether its rounding is, of an EMA with `DECAY`.
        buffers: what it does with them: one of the words above.
        plans: of one average in which it can take part.
        before: updates by the first model that `setup` makes.
    """

    setup: Callable[[nn.Module, Plan], Prepared]
    exact: tuple[Exact, ...]
    ours: bool = False
    stochastic: bool = False
    buffers: str = COPIED
    plans: tuple[str, ...] = ONE_AVERAGE
    before: int = 0


def held_by(module: nn.Module) -> Averages:
    """The average that a module holds.

    Args:
        module: of averages, with the model's names.
    """
    return lambda: [dict([*module.named_parameters(), *module.named_buffers()])]


def averaged(weight: Weight) -> Exact:
    """The average of models, the first of which is copied.

    Args:
        weight: of each other.
    """

    def exact(models: Sequence[float]) -> float:
        value = models[0]
        for n, model in enumerate(models[1:], 1):
            value += weight(n) * (model - value)
        return value

    return exact


SWA = averaged(lambda n: 1 / (n + 1))
EMA = averaged(lambda n: 1 - DECAY)


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


def moving(size: int, device: torch.device) -> Prepared:
    """What the machine needs to move bytes: `x.add_(y)` on a CPU, a copy on a GPU.

    Args:
        size: in bytes.
        device: whose memory is meant.
    """
    if device.type == "cpu":
        # 12 bytes an element: x is read and written, y is read.
        added = min(size, ADD_LIMIT)
        x, y = torch.ones(added // 12), torch.ones(added // 12)
        return Prepared(partial(x.add_, y), None, added / size)
    copied = min(size, COPY_LIMIT)
    source, target = (torch.ones(copied // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return Prepared(partial(target.copy_, source), None, copied / size)


def ceiling(model: nn.Module, plan: Plan) -> Prepared:
    """What the machine needs to move an update's bytes.

    Args:
        model: the source of the averages.
        plan: the dtypes, and how many averages.
    """
    return moving(update_bytes(model, plan), next(model.parameters()).device)


OURS = "fastswa AveragedModel"
TORCH = "torch AveragedModel"
CACHED = "cached _foreach_lerp_"
CEILING = "ceiling"

PROVIDERS: dict[str, Provider] = {
    OURS: Provider(_fastswa, (SWA,), ours=True),
    f"{OURS}, EMA": Provider(_fastswa_ema, (EMA,), ours=True),
    TORCH: Provider(_torch_default, (SWA,)),
    f"{TORCH}, get_ema_multi_avg_fn": Provider(_torch_ema_multi, (EMA,)),
    CACHED: Provider(_cached_foreach, (EMA,)),
}
"""Of one average, by the names in the results, with torch alone; benchmarks/registry.py has all."""
