"""The rules against the libraries that they are named after, over 50 random steps each.

The library's tensors are compared with our recursion in float64, a += w(n) (p - a), fed as the docstrings say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fastswa import EMA, InversePowerWarmup, PowerEMA, RatioWarmup
from fastswa.rules import Rule
from tests.numerics import assert_close_in_ulps, lerp_ulps

STEPS = 50
Tensors = Iterable[Tensor]
# The model -> a function to call after each step, and one for the averaged tensors.
Make = Callable[[nn.Module], tuple[Callable[[], object], Callable[[], Tensors]]]


@dataclass(frozen=True)
class Peer:
    """A library's average: how it is made and updated, the rule that equals it, and how many models it starts with."""

    rule: Rule
    make: Make
    copies_at_construction: bool = False
    counts_first_twice: bool = False
    # Of the weight, where the library computes it in less than float64.
    weight_error: float = 0.0


def torch_ema(decay: float, **arguments: bool) -> Make:
    def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], Tensors]]:
        from torch_ema import ExponentialMovingAverage

        average = ExponentialMovingAverage(model.parameters(), decay, **arguments)
        return average.update, lambda: average.shadow_params

    return make


def ema_pytorch(**arguments: float) -> Make:
    def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], Tensors]]:
        from ema_pytorch import EMA

        average = EMA(model, **arguments)
        return average.update, average.ema_model.parameters

    return make


def karras(**arguments: float) -> Make:
    def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], Tensors]]:
        from ema_pytorch.post_hoc_ema import KarrasEMA

        average = KarrasEMA(model, update_every=1, **arguments)
        return average.update, average.ema_model.parameters

    return make


def timm(**arguments: float) -> Make:
    def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], Tensors]]:
        from timm.utils import ModelEmaV3

        average = ModelEmaV3(model, **arguments)
        # timm's train.py counts the step before it passes it.
        counter = iter(range(1, STEPS + 1))
        return lambda: average.update(model, step=next(counter)), average.module.parameters

    return make


def diffusers(**arguments: float) -> Make:
    def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], Tensors]]:
        from diffusers.training_utils import EMAModel

        average = EMAModel(model.parameters(), **arguments)
        return lambda: average.step(model.parameters()), lambda: average.shadow_params

    return make


SHAPE = {"inv_gamma": 2.0, "power": 0.75}
PEERS = {
    "torch_ema": Peer(EMA(0.7, warmup=RatioWarmup()), torch_ema(0.7), copies_at_construction=True),
    "torch_ema_fixed": Peer(EMA(0.7), torch_ema(0.7, use_num_updates=False), copies_at_construction=True),
    "timm_fixed": Peer(EMA(0.8), timm(decay=0.8)),
    "timm_start": Peer(EMA(0.8, start=5), timm(decay=0.8, update_after_step=5)),
    "timm_warmup": Peer(
        EMA(0.9, warmup=InversePowerWarmup(2.0, 0.75)),
        timm(decay=0.9, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75),
    ),
    "timm_bounds": Peer(
        EMA(0.8, warmup=InversePowerWarmup(min_decay=0.5, update_after_step=4)),
        timm(decay=0.8, use_warmup=True, min_decay=0.5, update_after_step=4),
    ),
    "diffusers": Peer(EMA(0.7, warmup=RatioWarmup()), diffusers(decay=0.7)),
    "diffusers_foreach": Peer(
        EMA(0.7, warmup=RatioWarmup(min_decay=0.3, update_after_step=3)),
        diffusers(decay=0.7, min_decay=0.3, update_after_step=3, foreach=True),
    ),
    "diffusers_warmup": Peer(
        EMA(0.9, warmup=InversePowerWarmup(2.0, 0.75)), diffusers(decay=0.9, use_ema_warmup=True, **SHAPE)
    ),
    # Its decay is a float32 power of a float32 number near 1: three roundings of half of 2^-24 or less.
    "ema_pytorch": Peer(
        EMA(0.9, warmup=InversePowerWarmup(2.0, 0.75, update_after_step=3)),
        ema_pytorch(beta=0.9, update_after_step=3, update_every=1, **SHAPE),
        weight_error=2.0**-23,
    ),
    "ema_pytorch_every": Peer(
        EMA(0.9, every=2, warmup=InversePowerWarmup(1.0, 0.75, 0.4, update_after_step=2)),
        ema_pytorch(beta=0.9, update_after_step=4, update_every=2, min_value=0.4, **SHAPE),
        weight_error=2.0**-23,
    ),
    # It counts the first model twice (its step is advanced before the decay is taken), which the paper does not.
    # Both take a power of a rounded number, which errs by gamma + 1, at most 8, times 2^-54.
    "karras_gamma": Peer(PowerEMA(gamma=2.5), karras(gamma=2.5), counts_first_twice=True, weight_error=2.0**-50),
    "karras_sigma": Peer(
        PowerEMA(sigma_rel=0.1), karras(sigma_rel=0.1), counts_first_twice=True, weight_error=2.0**-50
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("torchvision_imports")
def test_each_step_equals_the_peer(name: str, dtype: torch.dtype) -> None:
    peer = PEERS[name]
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
    update, tensors = peer.make(model)
    exact = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in model.parameters()]
    largest = [tensor.detach().abs().double() for tensor in model.parameters()]
    n, bound = 0, 0.0

    def take() -> None:
        nonlocal n, bound
        (weight,) = peer.rule.copy_weights(n)
        n += 1
        for average, tensor in zip(exact, model.parameters(), strict=True):
            average += weight * (tensor.detach() - average)
        # What a step errs by, the next one shrinks. Both sides round: as much as one lerp, half an ulp for the weight
        # in this dtype, half to spare; a wrong weight acts on a distance of two operands.
        own = 2 * lerp_ulps(dtype) + 1 + 4 * peer.weight_error / torch.finfo(dtype).eps
        bound = (1 - weight) * bound + own

    if peer.copies_at_construction:
        take()
    for step in range(STEPS):
        with torch.no_grad():
            for tensor, size in zip(model.parameters(), largest, strict=True):
                tensor += 0.3 * torch.randn_like(tensor)
                torch.maximum(size, tensor.abs().double(), out=size)
        update()
        if peer.rule.due(step):
            take()
            if peer.counts_first_twice and n == 1:
                take()
        if step < peer.rule.start:
            continue
        for average, tensor, size in zip(exact, tensors(), largest, strict=True):
            assert_close_in_ulps(tensor.detach(), average, bound, size)
