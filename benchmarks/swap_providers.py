"""Ways to evaluate a model with its average, and to go on training with its own weights, and whether each is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from benchmarks import torchvision_operators
from benchmarks.providers import DECAY
from benchmarks.verify import YES, change, refusal


@dataclass(frozen=True)
class Lending:
    """A provider, ready for one model.

    Args:
        lent: a context in which the model holds the average.
        average: tensors by the model's names, outside that context.
    """

    lent: Callable[[], AbstractContextManager[Any]]
    average: Callable[[], Mapping[str, Tensor]]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _averages(model: nn.Module) -> fastswa.WeightAverages:
    averages = fastswa.WeightAverages(model, fastswa.EMA(DECAY))
    averages.update()
    return averages


def _swapped(model: nn.Module) -> Lending:
    averages = _averages(model)
    return Lending(averages.swapped, averages.weights)


def _copy_to(model: nn.Module) -> Lending:
    averages = _averages(model)

    @contextmanager
    def lent() -> Iterator[None]:
        own = list(_tensors(model).values())
        kept = [tensor.clone() for tensor in own]
        averages.copy_to()
        try:
            yield
        finally:
            torch._foreach_copy_(own, kept)

    return Lending(lent, averages.weights)


def _load_state_dict(model: nn.Module) -> Lending:
    """What is left to users of torch's class who can't call its own module."""
    module = swa_utils.AveragedModel(model).module

    @contextmanager
    def lent() -> Iterator[None]:
        kept = deepcopy(model.state_dict())
        model.load_state_dict(module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(kept)

    return Lending(lent, module.state_dict)


def _torch_ema(model: nn.Module) -> Lending:
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), decay=DECAY)
    names = [name for name, _ in model.named_parameters()]
    return Lending(average.average_parameters, lambda: dict(zip(names, average.shadow_params, strict=True)))


def _diffusers(model: nn.Module, foreach: bool = False) -> Lending:
    torchvision_operators.declare()
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=DECAY, foreach=foreach)
    names = [name for name, _ in model.named_parameters()]

    @contextmanager
    def lent() -> Iterator[None]:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        try:
            yield
        finally:
            average.restore(model.parameters())

    return Lending(lent, lambda: dict(zip(names, average.shadow_params, strict=True)))


def _lightning(model: nn.Module) -> Lending:
    torchvision_operators.declare()
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, trainer = LightningModule(), SimpleNamespace(global_step=0)
    module.model = model
    module.to(next(model.parameters()).device)
    callback = EMAWeightAveraging(decay=DECAY)
    callback.setup(trainer, module, "fit")

    @contextmanager
    def lent() -> Iterator[None]:
        callback.on_validation_epoch_start(trainer, module)
        try:
            yield
        finally:
            callback.on_validation_epoch_end(trainer, module)

    return Lending(lent, lambda: callback._average_model.module.model.state_dict())


SWAPPED = "fastswa WeightAverages.swapped"

LENDERS: dict[str, Callable[[nn.Module], Lending]] = {
    SWAPPED: _swapped,
    "fastswa WeightAverages.copy_to and back": _copy_to,
    "torch AveragedModel, load_state_dict": _load_state_dict,
    "torch_ema average_parameters": _torch_ema,
    "diffusers store, copy_to, restore": _diffusers,
    "diffusers store, copy_to, restore, foreach": lambda model: _diffusers(model, foreach=True),
    "Lightning validation hooks": _lightning,
}
"""By the names in the results; the others' times are compared with the first's."""


def fault(model: nn.Module, lending: Lending) -> str | None:
    """What is wrong with a provider, bit for bit.

    Args:
        model: whose weights are not those of the average.
        lending: of it.

    Returns:
        The verdict in words; None where the model holds the average inside, and its own weights afterwards.
    """
    average = {name: tensor.detach().clone() for name, tensor in lending.average().items()}
    own = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    with lending.lent():
        inside = _difference(own | average, _tensors(model))
    if inside:
        return f"wrong: inside, {inside} is not the average's"
    after = _difference(own, _tensors(model))
    if after:
        return f"wrong: afterwards, {after} is not the model's own"
    kept = _difference(average, lending.average())
    return f"wrong: afterwards, the average has another {kept}" if kept else None


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    return next((name for name, value in expected.items() if not torch.equal(value, found[name].detach())), None)


def prepare(model: nn.Module) -> tuple[dict[str, Lending], dict[str, str]]:
    """Make every provider's average of a model, change the model's weights, and check all.

    Args:
        model: whose weights are changed.

    Returns:
        The providers that may be timed, and a verdict for each.
    """
    lendings: dict[str, Lending] = {}
    verdicts: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], object]) -> object:
        try:
            return action()
        except Exception as error:
            verdicts[name] = refusal(error, name.startswith("fastswa "))
            return None

    for name, setup in LENDERS.items():
        made = attempt(name, lambda setup=setup: setup(model))
        if isinstance(made, Lending):
            lendings[name] = made
    change(model)
    for name, lending in list(lendings.items()):
        found = attempt(name, lambda lending=lending: fault(model, lending) or YES)
        verdicts.setdefault(name, str(found))
        if verdicts[name] != YES:
            del lendings[name]
    return lendings, verdicts
