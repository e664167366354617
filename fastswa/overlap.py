"""Work on a side stream, which hides under the next forward and backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class SideStream:
    """Runs work beside the current stream, and makes every `optimizer.step()` wait for it on the device.

    The work must not read what a forward pass writes (the statistics of BatchNorm): the caller copies that on the
    current stream. Tensors that the work uses must be kept until a `wait`, or be named in `reads`; call `wait` before
    anything else that writes what the work reads, or touches what it writes. A replayed CUDA graph that holds the
    optimizer's step calls no hook: `wait` before the replay.

    A copy, or what is unpickled, has a stream of its own and nothing to wait for: whoever copies the tensors waits.

    Args:
        device: of the tensors; where it is not CUDA, everything runs at once.

    Example:
        >>> side = SideStream(torch.device("cpu"))
        >>> side.run(lambda: print("averaged"))
        averaged
        >>> side.wait()
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._last: list[torch.cuda.Event] = []
        hook = register_optimizer_step_pre_hook(_before_step(weakref.ref(self)))
        # The memory of a dropped average is used anew by the current stream, so that stream has to wait even then.
        weakref.finalize(self, _end, hook, device, self._last).atexit = False

    def run(self, work: Callable[[], None], reads: Sequence[Tensor] = ()) -> None:
        """Run work after everything that the current stream was given, without blocking the host or that stream.

        Args:
            work: puts kernels on the current stream, which is the side stream while it runs.
            reads: tensors on the device that may be let go before the work is done.
        """
        if self._stream is None or torch.cuda.is_current_stream_capturing():
            # A branch of a CUDA graph would have to join before the capture ends, which nobody here can see to.
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in reads:
            tensor.record_stream(self._stream)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            self._last[:] = [self._stream.record_event()]

    def wait(self) -> None:
        """Make the current stream wait for the work that was run; the host goes on."""
        _wait(self._device, self._last)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._device,)


def _wait(device: torch.device, last: Sequence[torch.cuda.Event]) -> None:
    # The event stays: another stream may come to wait for it too. A capture may not wait for what came before it, and
    # need not: torch.cuda.graph starts with an idle device.
    if last and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_event(last[0])


def _before_step(side: weakref.ref[SideStream]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        alive = side()
        if alive is not None:
            alive.wait()

    # A compiled step would be compiled again for every new event.
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def _end(hook: RemovableHandle, device: torch.device, last: Sequence[torch.cuda.Event]) -> None:
    hook.remove()
    _wait(device, last)
