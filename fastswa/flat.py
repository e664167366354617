"""Contiguous memory under tensors that keep their own shapes, strides and storages."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

ALIGNMENT = 128
"""Bytes: on a GPU every tensor starts on a cache line, so that every one qualifies for 128-bit access."""

PAGE, PAGED = 1 << 12, 1 << 16
"""Bytes: on a CPU a tensor of 16 pages or more starts as far into a page as its buffer. The C library starts all large
tensors alike, the model's too; where average and source lie half a page apart, an update takes 6 % longer or more."""


_MOVABLE = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def stay_reason(tensor: Tensor) -> str | None:
    """Why a tensor has to stay in the memory that it has.

    Args:
        tensor: any strided tensor.

    Returns:
        The reason in words, or None where it may move.

    Example:
        >>> stay_reason(torch.zeros(3).share_memory_())
        'it is shared with other processes'
    """
    if not tensor.numel():
        return "it is empty"
    if tensor.dtype not in _MOVABLE or tensor.device.type not in ("cpu", "cuda"):
        return f"DLPack may not know {tensor.dtype} on {tensor.device.type}"
    # Every CUDA tensor says that it is shared.
    if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
        return "it is shared with other processes"
    return None


class FlatBuffers:
    """Move tensors into one buffer for each (device, dtype), in the order given.

    Each tensor keeps its identity, shape, values and memory format, and gets dense strides. Its memory becomes a
    stretch of the buffer through a storage of its own: saving, copying or deleting one tensor concerns that stretch
    alone, though the buffer lives as long as any of them. Tensors that must stay where they are (`stay_reason`) do.
    A tensor that gets other memory, or is deleted, lets its storage go, and `intact` turns False, at no cost to anyone.
    Only an alias of the old memory that somebody keeps (a `state_dict`) delays that until the alias is gone.

    Args:
        tensors: strided tensors of any shape and dtype, each listed once.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> flat = FlatBuffers(list(layer.parameters()))
        >>> flat.span(layer.weight, layer.bias).shape
        torch.Size([8])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.intact = True
        """Whether every tensor that was moved still has the memory it was given."""
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._place: dict[int, _Place] = {}
        tensors = [tensor for tensor in tensors if stay_reason(tensor) is None]
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        offsets = []
        for tensor in tensors:
            key = (tensor.device, tensor.dtype)
            step = _alignment(tensor) // tensor.element_size()
            offset = -(-sizes.get(key, 0) // step) * step
            offsets.append(offset)
            sizes[key] = offset + tensor.numel()
        buffers = {
            (device, dtype): torch.empty(size, dtype=dtype, device=device) for (device, dtype), size in sizes.items()
        }
        for tensor, offset in zip(tensors, offsets, strict=True):
            key = (tensor.device, tensor.dtype)
            _move(tensor, buffers[key][offset : offset + tensor.numel()])
            self._place[tensor.data_ptr()] = _Place(buffers[key], offset)
            # By a weak reference: a storage must not keep these buffers alive.
            self._storages.append(weakref.ref(tensor.untyped_storage(), partial(_let_go, weakref.ref(self))))

    def adjacent(self, first: Tensor, second: Tensor) -> bool:
        """Whether a tensor starts in a buffer where another ends.

        Args:
            first: a tensor that was moved, or a view of its memory.
            second: the same.
        """
        one, other = self._place.get(first.data_ptr()), self._place.get(second.data_ptr())
        return (
            one is not None
            and other is not None
            and one.buffer is other.buffer
            and first.data_ptr() + first.nbytes == second.data_ptr()
        )

    def span(self, first: Tensor, last: Tensor) -> Tensor:
        """The stretch of buffer from one tensor to the end of another.

        Args:
            first: a tensor that was moved, or a view of its memory.
            last: the same, or a later one of the same buffer.

        Returns:
            A one-dimensional view of the buffer, of the dtype of `first`.
        """
        start = self._place[first.data_ptr()]
        size = (last.data_ptr() + last.nbytes - first.data_ptr()) // start.buffer.element_size()
        return start.buffer[start.offset : start.offset + size].view(first.dtype)


def _let_go(buffers: weakref.ref[FlatBuffers], _: object) -> None:
    alive = buffers()
    if alive is not None:
        alive.intact = False


def _alignment(tensor: Tensor) -> int:
    """Bytes of which a tensor's distance from the start of its buffer is a multiple."""
    if tensor.device.type != "cpu":
        return ALIGNMENT
    # Small ones stand end to end, so that neighbours can be averaged as one.
    return PAGE if tensor.nbytes >= PAGED else tensor.element_size()


@dataclass(frozen=True)
class _Place:
    buffer: Tensor
    offset: int


@torch.no_grad()
def _move(tensor: Tensor, stretch: Tensor) -> None:
    """Make `stretch` the memory of `tensor`, through a storage that ends where the stretch ends."""
    # A plain view would share the buffer's storage, and torch.save of one layer would write the whole buffer.
    own = from_dlpack(to_dlpack(stretch))
    strides = torch.empty_like(tensor, device="meta").stride()
    dense = own.as_strided(tensor.shape, strides)
    dense.copy_(tensor)
    tensor.data = dense
