"""A small multi-layer perceptron."""

from __future__ import annotations

from torch import nn


class MLP(nn.Sequential):
    """Hidden layers with BatchNorm1d and ReLU, then a linear one.

    Args:
        inputs: of a sample.
        width: of each hidden layer.
        depth: hidden layers.
        classes: to tell apart.

    Example:
        >>> MLP()(torch.randn(5, 784)).shape
        torch.Size([5, 10])
    """

    def __init__(self, inputs: int = 784, width: int = 256, depth: int = 3, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for layer in range(depth):
            layers += [nn.Linear(width if layer else inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, classes))
