"""Counts what a batch costs apart from time: reads that make the host wait for the device, and launches.

A pass also does something once, so two passes are counted, and the difference is shared among the batches that one of
them has more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.batch_norm.cases import Workload
from benchmarks.batch_norm.providers import Provider
from benchmarks.clocks import device_launches

READS = 2, 10
"""Batches of the two passes. What fastswa does at every eighth batch (confidence.EVERY) is in the difference once."""
LAUNCHES = 2, 4
"""The same for launches, of which the profiler takes long to tell."""
SAMPLES = 2
"""In each batch while reads are counted, whose number does not depend on it."""


class ReadCounter(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors (`aten._local_scalar_dense`), in a context.

    On a GPU the device of the tensor tells whether the host has to wait. A CPU has one memory for all; there the
    tensors that would be on the device are the model's (torch reads a counter among them), batches that wait beside it,
    and everything that is computed from these. A counter that the pass itself made and that only it adds to is taken to
    be on the host: that it is made there whatever the model's device, only a GPU can prove.

    Args:
        workload: of the pass.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self._on_cpu = workload.device.type == "cpu"
        # Weak references to storages: the memory may be freed, but no other storage takes over its identity.
        self._storages: set[StorageWeakRef] = set()
        self._mark((*workload.model.parameters(), *workload.model.buffers()))
        self._mark(() if workload.moves else workload.batches)
        self.device = 0
        """Reads that wait for the device."""
        self.host = 0
        """Other reads."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from_device = any(self._lives_on_device(tensor) for tensor in _tensors((args, kwargs)))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.device += from_device
            self.host += not from_device
        result = func(*args, **(kwargs or {}))
        if from_device:
            self._mark(_tensors(result))
        return result

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        if self._on_cpu:
            self._storages.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def _lives_on_device(self, tensor: Tensor) -> bool:
        if self._on_cpu:
            return StorageWeakRef(tensor.untyped_storage()) in self._storages
        return tensor.device.type != "cpu"


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def reads(provider: Provider, workload: Workload) -> tuple[float, float]:
    """How many numbers the host reads for each batch.

    Args:
        provider: that reads them.
        workload: its model's statistics are changed.

    Returns:
        Reads that wait for the device, and other reads.
    """

    def count(batches: Sequence[Tensor]) -> tuple[int, int]:
        with ReadCounter(workload) as counter:
            provider.run(workload, batches)
        return counter.device, counter.host

    device, host = _per_batch(count, [batch[:SAMPLES] for batch in workload.batches], *READS)
    return device, host


def launches(provider: Provider, workload: Workload) -> float | None:
    """How many kernels, copies and fills each batch starts on the GPU.

    Args:
        provider: that starts them.
        workload: its model's statistics are changed.

    Returns:
        The number, or None where the profiler can't see the device.
    """

    def count(batches: Sequence[Tensor]) -> tuple[int]:
        return (device_launches(lambda: provider.run(workload, batches)) or 0,)

    (found,) = _per_batch(count, workload.batches, *LAUNCHES)
    return found or None


def _per_batch(
    count: Callable[[Sequence[Tensor]], Sequence[int]], batches: Sequence[Tensor], few: int, many: int
) -> list[float]:
    batches = (list(batches) * many)[:many]
    return [(more - less) / (many - few) for more, less in zip(count(batches), count(batches[:few]), strict=True)]
