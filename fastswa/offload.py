"""Averages on the CPU of tensors on a GPU: one transfer for each dtype, and the averaging in a thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from fastswa.flat import ALIGNMENT

SLOTS = 2
"""Updates under way: one is transferred while the one before is averaged."""

Average = Callable[[Tensor | None], None]
"""Averages from staged tensors; where the flag on the CPU is given and true, it does nothing."""


class Offload:
    """Hands the values of tensors to a function on the CPU, off the training thread, in order, and loses none.

    `update` copies the values on the current stream, so the next optimizer step may write the tensors. Its memory on
    the device is one copy of the tensors. An error of the averaging is raised by the next `update` or `wait`, once. All
    updates handed over by then are left out, as they would go on from a half-written average; what the failed one wrote
    stays, and updates after the raise go on from there. What was handed over is finished before the interpreter exits,
    or the Offload is collected; an error that nobody could raise then goes to stderr.

    Call it from one thread only, and `wait` before a CUDA graph is captured. It can't be copied or pickled: its holder
    waits and drops it.

    Args:
        sources: tensors of any shape and dtype on one device, in memory that they keep.
        make: called for each slot with CPU tensors of the sources' shapes, dtypes and order; returns the function that
            averages from them. It runs without gradients, never two at a time, and must keep neither them nor the flag.

    Raises:
        ValueError: sources on several devices.

    Example:
        >>> weight, average = torch.ones(2), torch.zeros(2)
        >>> offload = Offload([weight], lambda staged: lambda skip: average.lerp_(staged[0], 0.5))
        >>> offload.update()
        >>> _ = weight.zero_()
        >>> offload.wait()
        >>> average
        tensor([0.5000, 0.5000])
    """

    def __init__(self, sources: Sequence[Tensor], make: Callable[[Sequence[Tensor]], Average]) -> None:
        devices = {source.device for source in sources}
        if len(devices) > 1:
            raise ValueError(f"sources must be on one device, got {', '.join(sorted(map(str, devices)))}")
        device = devices.pop() if devices else torch.device("cpu")
        self._sources = list(sources)
        # What is made here serves later calls and the thread too, which may be outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._transfer = _Transfer(self._sources, device) if device.type == "cuda" else None
            self._staged = [_Packed(self._sources, torch.device("cpu"), device.type == "cuda") for _ in range(SLOTS)]
            self._averages = [make(staged.tensors) for staged in self._staged]
        # The thread knows the queues and, only while it works, a job; so it keeps nothing alive.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(SLOTS):
            self._free.put(slot)
        self._errors: list[BaseException] = []
        # The interpreter joins other threads before it runs finalizers, so only a daemon can be ended by one.
        arguments = (self._jobs, self._free, self._errors)
        thread = threading.Thread(target=_work, args=arguments, name="fastswa-offload", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._jobs, thread, self._errors)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Take the sources' present values; blocks only while both slots are in use.

        Args:
            skip: one element, on the CPU or a GPU, where the host does not read it; handed on as a bool.

        Raises:
            RuntimeError: in the capture of a CUDA graph, as no replay would reach the thread.
            BaseException: whatever an earlier update raised.
        """
        if self._transfer is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("averages on the CPU can't be updated in a CUDA graph; update them after its replay")
        slot = self._free.get()
        try:
            if not self._errors:
                self._jobs.put(self._job(slot, skip))
                return
        except BaseException:
            self._free.put(slot)
            raise
        self._free.put(slot)
        self.wait()

    def wait(self) -> None:
        """Wait, on the host, until everything handed over is averaged.

        Raises:
            BaseException: whatever an earlier update raised.
        """
        held: list[int] = []
        try:
            while len(held) < SLOTS:
                held.append(self._free.get())
        finally:
            for slot in held:
                self._free.put(slot)
        if self._errors:
            raise self._errors.pop()

    def _job(self, slot: int, skip: Tensor | None) -> _Job:
        staged, copied = self._staged[slot], None
        if self._transfer is not None:
            copied = self._transfer.start(staged, self._sources, skip)
        else:
            staged.take(self._sources, skip)
        return _Job(slot, self._averages[slot], None if skip is None else staged.flag, copied)


class _Packed:
    """Tensors like the sources, with dense strides, in one buffer for each dtype, and room for a flag."""

    def __init__(self, sources: Sequence[Tensor], device: torch.device, pinned: bool) -> None:
        self.flag = torch.zeros(1, dtype=torch.bool, device=device, pin_memory=pinned)
        sizes: dict[torch.dtype, int] = {}
        offsets = []
        for source in sources:
            # Aligned, so that packing on a GPU moves 128 bits at a time.
            step = ALIGNMENT // source.element_size()
            offsets.append(-(-sizes.get(source.dtype, 0) // step) * step)
            sizes[source.dtype] = offsets[-1] + source.numel()
        self.buffers = {
            dtype: torch.empty(size, dtype=dtype, device=device, pin_memory=pinned) for dtype, size in sizes.items()
        }
        self.tensors = []
        self._by_dtype: dict[torch.dtype, list[int]] = {dtype: [] for dtype in sizes}
        for index, (source, offset) in enumerate(zip(sources, offsets, strict=True)):
            strides = torch.empty_like(source, device="meta").stride()
            self.tensors.append(self.buffers[source.dtype].as_strided(source.shape, strides, offset))
            self._by_dtype[source.dtype].append(index)

    def take(self, sources: Sequence[Tensor], skip: Tensor | None) -> None:
        """Copy the sources and the flag; tensors of one dtype go in one launch."""
        for indices in self._by_dtype.values():
            torch._foreach_copy_([self.tensors[index] for index in indices], [sources[index] for index in indices])
        if skip is not None:
            self.flag.copy_(skip.reshape(1) != 0)


class _Transfer:
    """From the sources, over one packed copy of them on the device, into pinned memory."""

    def __init__(self, sources: Sequence[Tensor], device: torch.device) -> None:
        self._packed = _Packed(sources, device, pinned=False)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        for buffer in (*self._packed.buffers.values(), self._packed.flag):
            buffer.record_stream(self._stream)

    def start(self, staged: _Packed, sources: Sequence[Tensor], skip: Tensor | None) -> torch.cuda.Event:
        """Begin, without blocking the host; the event is that of the arrival."""
        there = skip is not None and skip.device.type != "cpu"
        if skip is not None and not there:
            staged.flag.copy_(skip.reshape(1) != 0)
        current = torch.cuda.current_stream(self._stream.device)
        if self._copied is not None:
            # On the device: the transfer before may still read the packed copy.
            current.wait_event(self._copied)
        self._packed.take(sources, skip if there else None)
        self._stream.wait_stream(current)
        # A blocking event lets the thread sleep, where others would keep a core busy.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for dtype, buffer in self._packed.buffers.items():
                staged.buffers[dtype].copy_(buffer, non_blocking=True)
            if there:
                staged.flag.copy_(self._packed.flag, non_blocking=True)
            self._stream.record_event(self._copied)
        return self._copied


@dataclass(frozen=True)
class _Job:
    slot: int
    average: Average
    skip: Tensor | None
    copied: torch.cuda.Event | None


@torch.no_grad()
def _work(jobs: SimpleQueue[_Job | None], free: SimpleQueue[int], errors: list[BaseException]) -> None:
    while (job := jobs.get()) is not None:
        slot = job.slot
        try:
            # Even for what is left out: the slot is not free while a transfer writes it.
            if job.copied is not None:
                job.copied.synchronize()
            if not errors:
                job.average(job.skip)
        except BaseException as error:
            if not errors:
                errors.append(error)
        # A job kept until the next one would keep the averages alive.
        del job
        free.put(slot)


def _end(jobs: SimpleQueue[_Job | None], thread: threading.Thread, errors: list[BaseException]) -> None:
    jobs.put(None)
    # The last reference may have been dropped by the thread itself, with a job.
    if thread is not threading.current_thread():
        thread.join()
    if errors:
        raise errors.pop()
