"""The networks that the benchmarks run, in plain torch: no model zoo is required."""

from __future__ import annotations

from benchmarks.networks.digits import PreActivationResNet
from benchmarks.networks.mlp import MLP
from benchmarks.networks.preresnet import PreResNet164
from benchmarks.networks.resnet import ResNet50

__all__ = ["MLP", "PreActivationResNet", "PreResNet164", "ResNet50"]
