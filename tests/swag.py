"""SWAGs of random walks, and what they and their models hold."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastswa import SWAG
from tests.models import train_step


def vector(tensors: list[Tensor]) -> np.ndarray:
    """All values in float64, one tensor after another."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors]).numpy()


def parameters(model: nn.Module) -> np.ndarray:
    return vector(list(model.parameters()))


def held(swag: SWAG, key: str, slot: int | None = None) -> np.ndarray:
    """Mean, variance or a deviation, in the order of the model's parameters."""
    assert swag.module is not None
    found = swag.state_dict()[key] if slot is None else swag.state_dict()[key][slot]
    return vector([found[name] for name, _ in swag.module.named_parameters()])


def walked(
    model: nn.Module, steps: int, step: Callable[[nn.Module], None] = train_step, **options: object
) -> tuple[SWAG, np.ndarray]:
    """A SWAG of a random walk, and the walk, one model a row."""
    swag = SWAG(model, **options)
    models = []
    for _ in range(steps):
        step(model)
        swag.collect()
        models.append(parameters(model))
    return swag, np.stack(models)


def twelve() -> nn.Module:
    """Twelve parameters in two tensors."""
    return nn.Linear(3, 3)


def trained(model: nn.Module, steps: int = 5, **options: object) -> SWAG:
    swag = SWAG(model, **{"rank": 4, **options})
    for _ in range(steps):
        train_step(model)
        swag.collect()
    return swag


def save_and_load(swag: SWAG) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(swag.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in (*model.named_parameters(), *model.named_buffers())}


def contents(swag: SWAG) -> dict[str, object]:
    return copy.deepcopy(swag.state_dict())


def same(one: object, other: object) -> bool:
    """Equal in everything, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def sample(swag: SWAG, model: nn.Module) -> dict[str, Tensor]:
    target = copy.deepcopy(model)
    swag.sample_(target, generator=torch.Generator().manual_seed(1))
    return values(target)
