"""The networks that the benchmarks run, in plain torch: no model zoo is required."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from benchmarks.networks.digits import PreActivationResNet
from benchmarks.networks.gpt2 import GPT2
from benchmarks.networks.mlp import MLP
from benchmarks.networks.preresnet import PreResNet, PreResNet164
from benchmarks.networks.resnet import ResNet50
from benchmarks.networks.vgg import VGG16
from benchmarks.networks.wide_resnet import WideResNet

__all__ = [
    "GPT2",
    "MLP",
    "TRAINED",
    "VGG16",
    "PreActivationResNet",
    "PreResNet",
    "PreResNet164",
    "ResNet50",
    "WideResNet",
    "build",
]

TRAINED: dict[str, Callable[..., nn.Module]] = {
    "digits": PreActivationResNet,
    "preresnet20": partial(PreResNet, 20),
    "preresnet110": partial(PreResNet, 110),
    "preresnet164": PreResNet164,
    "vgg16": VGG16,
    "vgg16bn": partial(VGG16, batch_norm=True),
    "wrn28x10": partial(WideResNet, 28, 10),
}
"""The networks that `python -m benchmarks train` knows: all but "digits" take images of 32x32 pixels."""


def build(name: str, classes: int, channels: int) -> nn.Module:
    """A network with new random weights, drawn from torch's global generator.

    Args:
        name: a key of `TRAINED`.
        classes: to tell apart.
        channels: of an image.

    Raises:
        ValueError: there is no network of that name.

    Example:
        >>> build("digits", classes=10, channels=1)(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if name not in TRAINED:
        raise ValueError(f"there is no network {name!r}; known are {', '.join(TRAINED)}")
    return TRAINED[name](classes=classes, channels=channels)
