"""The other libraries' averages of one model, each as its users call it after a step of the optimizer.

Most are prepared by benchmarks/integrations. Every warm-up is off, so that each takes the model with the one weight
that the check knows. What becomes of buffers differs from library to library, and the check compares that.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from benchmarks import torchvision_operators
from benchmarks.providers import AVERAGED, DECAY, EMA, LEFT, NO_BUFFERS, TRUNCATED, Plan, Prepared, Provider, held_by


def _integrated(library: str, model: nn.Module, plan: Plan, **options: Any) -> Prepared:
    torchvision_operators.declare()
    if plan.average != plan.source:
        options["dtype"] = plan.average
    prepared: Prepared = import_module(f"benchmarks.integrations.{library}").original(model, **options)
    return prepared


def _peer(library: str, buffers: str, *plans: str, **options: Any) -> Provider:
    return Provider(partial(_integrated, library, **options), (EMA,), buffers=buffers, plans=("fp32", *plans))


def _timm_v2(model: nn.Module, plan: Plan) -> Prepared:
    torchvision_operators.declare()
    from timm.utils import ModelEmaV2

    average = ModelEmaV2(model, decay=DECAY)
    return Prepared(partial(average.update, model), held_by(average.module))


def _ema_pytorch(model: nn.Module, plan: Plan, **options: Any) -> Prepared:
    if plan.average != plan.source:
        options |= {"ema_model": deepcopy(model).to(plan.average), "coerce_dtype": True}
    module = import_module("benchmarks.integrations.ema_pytorch")
    # The decay lies between these two, so it is this one from the second update on.
    prepared: Prepared = module.original(model, beta=DECAY, min_value=DECAY, **options)
    return prepared


_DIFFUSERS = {"decay": DECAY, "min_decay": DECAY}

PEERS: dict[str, Provider] = {
    "timm ModelEmaV2": Provider(_timm_v2, (EMA,), buffers=TRUNCATED, plans=("fp32",)),
    "timm ModelEmaV3": _peer("timm", AVERAGED, "mixed", decay=DECAY),
    "ema-pytorch EMA": Provider(_ema_pytorch, (EMA,), buffers=LEFT, plans=("fp32", "mixed")),
    "ema-pytorch EMA, foreach": Provider(
        partial(_ema_pytorch, use_foreach=True), (EMA,), buffers=LEFT, plans=("fp32", "mixed")
    ),
    "torch_ema": _peer("torch_ema", NO_BUFFERS, "mixed", decay=DECAY, use_num_updates=False),
    "diffusers EMAModel": _peer("diffusers", NO_BUFFERS, "mixed", **_DIFFUSERS),
    "diffusers EMAModel, foreach": _peer("diffusers", NO_BUFFERS, "mixed", **_DIFFUSERS, foreach=True),
    "Lightning EMAWeightAveraging": _peer("lightning", TRUNCATED, decay=DECAY),
    # Of the ramp decay (1 - exp(-n / tau)) nothing is left.
    "ultralytics ModelEMA": _peer("ultralytics", LEFT, decay=DECAY, tau=1e-3),
}
"""Of one average, by the names in the results."""
