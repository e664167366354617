"""Counts what a call costs apart from time: numbers that the host reads, and memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Call


class ReadCounter(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors (`aten._local_scalar_dense`), in a context.

    On a GPU the device of the tensor tells whether the host has to wait. A CPU has one memory for all; there the
    tensors that would be on the device are those that are named (of a pass over batches the model's, among which torch
    reads a counter, and batches that wait beside it), and everything that is computed from these. A counter that the
    pass itself made and that only it adds to is taken to be on the host: that it is made there whatever the model's
    device, only a GPU can prove.

    Args:
        device: of the model.
        on_device: tensors that are there.
    """

    def __init__(self, device: torch.device, on_device: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._on_cpu = device.type == "cpu"
        # Weak references to storages: the memory may be freed, but no other storage takes over its identity.
        self._storages: set[StorageWeakRef] = set()
        self._mark(on_device)
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


def device_reads(call: Call, device: torch.device) -> int:
    """How many numbers the host reads from tensors in a call.

    Args:
        call: run once.
        device: where it computes.

    Returns:
        On a GPU the reads of tensors there, for which the host waits; on a CPU all, since nothing tells which of the
        tensors would be on a GPU.
    """
    with ReadCounter(device) as counter:
        call()
    return counter.device + (counter.host if device.type == "cpu" else 0)


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """The most memory that a call holds at one time beyond what was allocated before it.

    Args:
        call: run once; what only its first run allocates is left out if it has run before.
        device: whose memory is meant.

    Returns:
        Bytes, of tensors alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    # Of memory that was allocated before, the profiler does not see the end.
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's standard error, where the profiler tells of its start and its end."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
