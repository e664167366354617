"""Sees every call of BatchNorm layers, so that a layer which is called twice in a batch loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastswa.batch_norm.layers import Layer
from fastswa.batch_norm.moments import Moments


class CallWatch:
    """Collects which layers were called, and has their statistics merged: all at once, or before a second call.

    Args:
        layers: to watch.
        moments: that the statistics are merged into.
        observe: told of each call before it, with the layer's index, the module and its input; returns the weight of
            the statistics that the call leaves in `moments.batch_statistics`, or None if it leaves none.
    """

    def __init__(
        self, layers: Sequence[Layer], moments: Moments, observe: Callable[[int, nn.Module, Tensor], float | None]
    ) -> None:
        self.counts = [0] * len(layers)
        """Of each layer's calls."""
        self._layers = layers
        self._moments = moments
        self._observe = observe
        self._pending: dict[int, tuple[float, int]] = {}

    @contextmanager
    def watching(self, is_compiled: bool) -> Iterator[None]:
        """A context in which calls are seen.

        Args:
            is_compiled: whether the model has compiled parts, which run uncompiled meanwhile: a graph that was
                compiled before would go on without the hooks.
        """
        with ExitStack() as stack:
            if is_compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for index, layer in enumerate(self._layers):
                for module in layer.modules:
                    hook = module.register_forward_pre_hook(partial(self._called, index), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def _called(self, index: int, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if index in self._pending:
            self._moments.merge({index: self._pending.pop(index)})
        x = positional[0] if positional else named["input"]
        weight = self._observe(index, module, x) if x.numel() else None
        if weight is not None:
            self._pending[index] = weight, x.numel() // x.shape[1]
            self.counts[index] += 1

    def merge(self) -> None:
        """Merge what the batch left."""
        self._moments.merge(self._pending)
        self._pending = {}
