"""Where an update of averages runs: here and now, beside the training on a side stream, or in a thread on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastswa.followed import Followed
from fastswa.offload import Offload
from fastswa.overlap import SideStream

Average = Callable[[Tensor | None], None]
"""Takes values from fixed tensors into the averages, unless the flag is given and not zero."""


class Execution(Protocol):
    """Runs updates, and can be waited for."""

    def update(self, skip: Tensor | None) -> None:
        """Take the model's present values into the averages."""

    def wait(self) -> None:
        """Make what follows see every update so far."""


def execution(
    followed: Sequence[Followed],
    device: torch.device | None,
    overlap: bool,
    prepare: Callable[[Sequence[Tensor]], Average],
) -> Execution:
    """Choose where updates run.

    Args:
        followed: the model's tensors.
        device: of the averages; None for the model's own.
        overlap: run on a side stream, where the averages are on the model's GPU.
        prepare: makes the function that averages from given tensors, in the order of `followed`.

    Returns:
        What runs them.
    """
    if offloads(followed, device):
        return Offload([each.local for each in followed], prepare)
    return Beside(followed, prepare) if overlap else Now(followed, prepare)


def offloads(followed: Sequence[Followed], device: torch.device | None) -> bool:
    """Whether averages on the CPU follow tensors that are on another device.

    Args:
        followed: the model's tensors.
        device: of the averages; None for the model's own.
    """
    return device is not None and device.type == "cpu" and any(each.tensor.device.type != "cpu" for each in followed)


class Now:
    """Runs an update when it is asked for.

    Args:
        followed: the model's tensors.
        prepare: makes the function that averages from given tensors.
    """

    def __init__(self, followed: Sequence[Followed], prepare: Callable[[Sequence[Tensor]], Average]) -> None:
        self._average = prepare([each.local for each in followed])

    def update(self, skip: Tensor | None) -> None:
        """Take the model's present values into the averages."""
        self._average(skip)

    def wait(self) -> None:
        """Nothing is under way."""


class Beside:
    """Runs an update on a side stream, under the next forward and backward pass; `optimizer.step()` waits for it.

    A forward pass writes buffers, so these are copied before it can, on the current stream.

    Args:
        followed: the model's tensors.
        prepare: makes the function that averages from given tensors.
    """

    def __init__(self, followed: Sequence[Followed], prepare: Callable[[Sequence[Tensor]], Average]) -> None:
        self._buffers = [each.local for each in followed if each.buffer]
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        copies = iter(self._copies)
        self._average = prepare([next(copies) if each.buffer else each.local for each in followed])
        self._side = SideStream(followed[0].tensor.device)

    @torch.no_grad()
    def update(self, skip: Tensor | None) -> None:
        """Start taking the model's present values into the averages."""
        self.wait()
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        reads = [skip] if skip is not None and skip.is_cuda else []
        self._side.run(lambda: self._average(skip), reads)

    def wait(self) -> None:
        """Make the current stream wait for the last update."""
        self._side.wait()
