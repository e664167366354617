"""Counts what a batch costs apart from time: reads that make the host wait for the device, and launches.

A pass also does something once, so two passes are counted, and the difference is shared among the batches that one of
them has more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from benchmarks.batch_norm.cases import Workload
from benchmarks.batch_norm.providers import Provider
from benchmarks.clocks import device_launches
from benchmarks.counts import ReadCounter

READS = 2, 10
"""Batches of the two passes. What fastswa does at every eighth batch (confidence.EVERY) is in the difference once."""
LAUNCHES = 2, 4
"""The same for launches, of which the profiler takes long to tell."""
SAMPLES, SIDE = 2, 64
"""In each batch while reads are counted, and of images at most: the number does not depend on them."""


def reads(provider: Provider, workload: Workload) -> tuple[float, float]:
    """How many numbers the host reads for each batch.

    Args:
        provider: that reads them.
        workload: its model's statistics are changed.

    Returns:
        Reads that wait for the device, and other reads.
    """

    on_device = (*workload.model.parameters(), *workload.model.buffers(), *(() if workload.moves else workload.batches))

    def count(batches: Sequence[Tensor]) -> tuple[int, int]:
        with ReadCounter(workload.device, on_device) as counter:
            provider.run(workload, batches)
        return counter.device, counter.host

    device, host = _per_batch(count, [_cut(batch[:SAMPLES]) for batch in workload.batches], *READS)
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


def _cut(batch: Tensor) -> Tensor:
    return batch[..., :SIDE, :SIDE] if batch.dim() == 4 else batch


def _per_batch(
    count: Callable[[Sequence[Tensor]], Sequence[int]], batches: Sequence[Tensor], few: int, many: int
) -> list[float]:
    batches = (list(batches) * many)[:many]
    return [(more - less) / (many - few) for more, less in zip(count(batches), count(batches[:few]), strict=True)]
