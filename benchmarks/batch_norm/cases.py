"""The networks whose BatchNorm statistics are recomputed, with batches made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.networks import MLP, PreResNet164, ResNet50

PRECISIONS = ("fp32", "bf16_autocast")
SOURCES = ("device", "host")
"""Where the batches wait: beside the model, or in pinned host memory, from where each pass has to move them."""


@dataclass(frozen=True)
class Case:
    """A network and its batches.

    Args:
        network: makes it.
        shape: of a batch.
        batches: of a pass, by the device's type. What a pass does once (resetting statistics, writing them) counts in
            full, so a small network needs many.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: Mapping[str, int]


CASES = {
    "mlp": Case(MLP, (128, 784), {"cpu": 100, "cuda": 100}),
    "preresnet164": Case(PreResNet164, (128, 3, 32, 32), {"cpu": 1, "cuda": 20}),
    "resnet50_batch8": Case(ResNet50, (8, 3, 224, 224), {"cpu": 2, "cuda": 20}),
    "resnet50_batch256": Case(ResNet50, (256, 3, 224, 224), {"cpu": 2, "cuda": 10}),
}


@dataclass(frozen=True)
class Workload:
    """A model on its device and the batches of a pass.

    Args:
        model: in evaluation mode, as after averaging.
        batches: of one pass.
        device: of the model.
        moves: whether a pass has to move the batches there.
        precision: one of `PRECISIONS`.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    device: torch.device
    moves: bool
    precision: str

    @property
    def layers(self) -> list[_BatchNorm]:
        """The model's BatchNorm layers."""
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def computing(self) -> AbstractContextManager[object]:
        """The context in which a pass runs."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def prepare(case: str, precision: str, source: str, device: torch.device) -> Workload:
    """Make a model and batches of random numbers.

    Args:
        case: a key of `CASES`.
        precision: one of `PRECISIONS`.
        source: one of `SOURCES`.
        device: of the model.
    """
    torch.manual_seed(0)
    known = CASES[case]
    model = known.network().to(device).eval()
    moves = source == "host"
    place = torch.device("cpu") if moves else device
    batches = [torch.randn(known.shape, device=place) for _ in range(known.batches[device.type])]
    if moves and device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    return Workload(model, batches, device, moves, precision)
