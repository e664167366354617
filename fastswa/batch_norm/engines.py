"""The two ways to collect BatchNorm statistics in a pass, and which one when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fastswa import backends
from fastswa.batch_norm.calls import CallWatch
from fastswa.batch_norm.layers import Layer, Statistics
from fastswa.batch_norm.moments import Channels, Moments

Choice = Literal["auto", "eager", "merge"]
Estimator = Literal["torch", "weighted", "population"]

_HALF = (torch.bfloat16, torch.float16)


class Engine(Protocol):
    """Collects the statistics of layers that have been lent its buffers and its momentum."""

    @property
    def momentum(self) -> float | None:
        """The momentum that the layers need."""

    @property
    def buffers(self) -> Sequence[Mapping[str, Tensor]]:
        """For each layer the buffers that it needs, by name."""

    @property
    def moments(self) -> Moments | None:
        """The merged statistics, where each batch's were kept apart."""

    def running(self) -> AbstractContextManager[None]:
        """A context in which batches are collected."""

    def batch(self, forward: Callable[[], object], samples: int | None) -> None:
        """Run a batch through the model and collect its statistics."""

    def calls(self) -> Sequence[int]:
        """How often each layer was called."""

    def statistics(self, calls: Sequence[int]) -> list[Statistics]:
        """What was collected for each layer, with its number of calls (of all processes)."""


def compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it runs as a compiled graph.

    Args:
        model: to look through.

    Example:
        >>> compiled(torch.compile(torch.nn.Linear(2, 2)))
        True
    """
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())


def choose(
    engine: str, estimator: str, needs_moments: str | None, is_compiled: bool, layers: Sequence[Layer]
) -> Literal["eager", "merge"]:
    """The engine of a pass: the only place that decides it.

    Args:
        engine: "eager" and "merge" are obeyed; "auto" decides.
        estimator: "torch", "weighted" or "population".
        needs_moments: an argument of the caller that only "merge" can serve, by name.
        is_compiled: whether the model runs as a compiled graph.
        layers: that take part.

    Returns:
        "eager" or "merge".

    Raises:
        ValueError: another name, or "eager" where it can't serve; says why.

    Example:
        >>> choose("auto", "torch", None, False, [])
        'eager'
    """
    if engine not in get_args(Choice):
        raise ValueError(f"engine must be one of {get_args(Choice)}, got {engine!r}")
    cannot = needs_moments or ("estimator='population'" if estimator == "population" else None)
    if engine == "eager" and cannot:
        raise ValueError(f"engine='eager' can't serve {cannot}, which needs each batch's own statistics; use 'merge'")
    half = next((layer.name for layer in layers if layer.mean.dtype in _HALF), None)
    reason = cannot
    if is_compiled:
        reason = reason or "the model is compiled, and a momentum of None would break its graph"
    if half:
        reason = reason or f"{half} has half-precision statistics, in which a cumulative average stalls"
    if engine == "auto" and reason:
        backends.say_once(f"update_bn merges each batch's statistics in float64: {reason}")
    return "merge" if engine == "merge" or (engine == "auto" and reason) else "eager"


class EagerEngine:
    r"""The layers average cumulatively with their own kernels; what they divide by lives on the host.

    A layer whose momentum is None adds 1 to its counter and averages with :math:`1 / counter`, which on a GPU waits
    for the device. The counter lent to it is a number on the CPU. To weight batches by samples it counts in units of
    the present batch: :math:`1 / (n / b + 1) = b / (n + b)`, also for a layer that is called twice.

    Args:
        layers: that take part.
        weighted: weight a batch by its samples, not equally.
        is_compiled: whether the model has compiled parts, which run uncompiled: their graphs would break.
    """

    momentum = None
    moments = None

    def __init__(self, layers: Sequence[Layer], weighted: bool, is_compiled: bool) -> None:
        self._weighted = weighted
        self._is_compiled = is_compiled
        self._samples = 1
        # Adding to an integer is quicker, and does where nothing is rescaled.
        self._counters = torch.zeros(len(layers), dtype=torch.float64 if weighted else torch.int64, device="cpu")
        self._counted_from = self._counters.clone()
        self._calls = self._counters.clone()
        self.buffers = [
            {
                "running_mean": torch.zeros_like(layer.mean),
                "running_var": torch.ones_like(layer.var),
                "num_batches_tracked": counter,
            }
            for layer, counter in zip(layers, self._counters.unbind(), strict=True)
        ]

    def running(self) -> AbstractContextManager[None]:
        """A context in which batches are collected."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def batch(self, forward: Callable[[], object], samples: int | None) -> None:
        """Run a batch through the model.

        Args:
            forward: does it.
            samples: of the batch.
        """
        if self._weighted:
            if samples == 0:
                return
            self._count_in(_known(samples))
        forward()

    def _count_in(self, samples: int) -> None:
        """Change the counters' unit."""
        if samples != self._samples:
            self._calls += self._counters - self._counted_from
            self._counters *= self._samples / samples
            self._counted_from.copy_(self._counters)
            self._samples = samples

    def calls(self) -> Sequence[int]:
        """How often each layer was called."""
        return [round(calls) for calls in (self._calls + self._counters - self._counted_from).tolist()]

    def statistics(self, calls: Sequence[int]) -> list[Statistics]:
        """What the layers collected.

        Args:
            calls: of each layer.
        """
        return [
            (buffers["running_mean"], buffers["running_var"], count)
            for buffers, count in zip(self.buffers, calls, strict=True)
        ]


class MergeEngine:
    """With a momentum of 1 the layers leave a batch's statistics in a scratch; one launch merges those of all layers.

    The merge is float64 and knows each channel's standard error. A compiled model runs its graph, in which the layers
    count their own calls on their device; elsewhere hooks see the calls.

    Args:
        layers: that take part.
        estimator: "torch" weights batches equally, "weighted" by samples, "population" each layer's by values.
        is_compiled: whether the model has compiled parts. They run uncompiled for "population", because a graph can't
            tell how many values a layer saw, and where a layer is called twice in a batch.
    """

    momentum = 1.0

    def __init__(self, layers: Sequence[Layer], estimator: str, is_compiled: bool) -> None:
        self._estimator = estimator
        self._is_compiled = is_compiled
        self._in_graph = is_compiled and estimator != "population"
        self.moments = Moments([Channels(len(layer.mean), layer.mean.dtype, layer.mean.device) for layer in layers])
        self._calls = CallWatch(layers, self.moments, self._observe)
        self._weight = 1
        self._first = True
        self._stack = ExitStack()
        self.buffers = [
            {
                "running_mean": mean,
                "running_var": var,
                # Where hooks count, a counter on the CPU spares each layer a launch.
                "num_batches_tracked": counter if self._in_graph else torch.zeros_like(counter, device="cpu"),
            }
            for (mean, var), counter in zip(self.moments.batch_statistics, self.moments.counters, strict=True)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which batches are collected."""
        with self._stack:
            if not self._in_graph:
                self._stack.enter_context(self._calls.watching(self._is_compiled))
            yield

    def _observe(self, index: int, module: nn.Module, x: Tensor) -> float | None:
        if not module.training:
            return None
        return x.numel() // x.shape[1] if self._estimator == "population" else self._weight

    def batch(self, forward: Callable[[], object], samples: int | None) -> None:
        """Run a batch through the model and merge its statistics.

        Args:
            forward: does it; the first batch may be run twice.
            samples: of the batch.
        """
        if samples == 0:
            return
        self._weight = _known(samples) if self._estimator == "weighted" else 1
        forward()
        if self._in_graph and self._first and self.moments.most_calls() > 1:
            backends.say_once("update_bn runs the model uncompiled: it calls a BatchNorm layer twice in a batch")
            self._in_graph = False
            self._stack.enter_context(self._calls.watching(self._is_compiled))
            forward()
        self._first = False
        if self._in_graph:
            self.moments.merge_called(self._weight)
        else:
            self._calls.merge()

    def calls(self) -> Sequence[int]:
        """How often each layer was called. Waits for the device if the model ran as a graph."""
        return self.moments.calls() if self._in_graph else self._calls.counts

    def statistics(self, calls: Sequence[int]) -> list[Statistics]:
        """What was merged.

        Args:
            calls: of each layer.
        """
        pooled = self._estimator == "population"
        return [(*result, count) for result, count in zip(self.moments.results(pooled), calls, strict=True)]


def _known(samples: int | None) -> int:
    if samples is None:
        raise ValueError("estimator='weighted' needs the number of samples, and a batch holds no tensor to tell it")
    return samples
