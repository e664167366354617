"""Sweeps: passes in evaluation mode, each of which makes one more layer in depth exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastswa import backends
from fastswa.batch_norm.calls import CallWatch
from fastswa.batch_norm.layers import Layer, Statistics
from fastswa.batch_norm.moments import Channels, Moments


class SweepEngine:
    """Collects the statistics of what reaches each layer while all layers normalise with given statistics.

    A layer whose inputs come from layers with exact statistics gets exact ones, and keeps them in later sweeps; so as
    many sweeps as layers make all exact, whatever the order and the size of the batches.

    Args:
        layers: that take part.
        statistics: with which they normalise.
        is_compiled: whether the model has compiled parts.
    """

    momentum = None

    def __init__(self, layers: Sequence[Layer], statistics: Sequence[Statistics], is_compiled: bool) -> None:
        self._is_compiled = is_compiled
        self.moments = Moments([Channels(len(layer.mean), torch.float64, layer.mean.device) for layer in layers])
        self._calls = CallWatch(layers, self.moments, self._observe)
        self.buffers = [
            {
                "running_mean": mean.to(layer.mean.dtype) if calls else layer.mean,
                "running_var": var.to(layer.var.dtype) if calls else layer.var,
            }
            for layer, (mean, var, calls) in zip(layers, statistics, strict=True)
        ]

    def running(self) -> AbstractContextManager[None]:
        """A context in which batches are collected."""
        return self._calls.watching(self._is_compiled)

    def _observe(self, index: int, module: nn.Module, x: Tensor) -> float:
        count, mean, squares = backends.batch_norm_kernels(x.device).batch_stats(x)
        batch_mean, batch_var = self.moments.batch_statistics[index]
        batch_mean.copy_(mean)
        torch.div(squares, max(count - 1, 1), out=batch_var)
        return float(count)

    def batch(self, forward: Callable[[], object], samples: int | None) -> None:
        """Run a batch through the model and merge its statistics.

        Args:
            forward: does it.
            samples: not needed.
        """
        forward()
        self._calls.merge()

    def calls(self) -> Sequence[int]:
        """How often each layer was called."""
        return self._calls.counts

    def statistics(self, calls: Sequence[int]) -> list[Statistics]:
        """The pooled mean and variance of each layer's input."""
        return [(*result, count) for result, count in zip(self.moments.results(pooled=True), calls, strict=True)]
