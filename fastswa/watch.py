"""Notice that a module's tensors were replaced or moved, without walking the module.

Walking `parameters()` costs several times more than this check, which keeps the dictionaries that hold the tensors and
reads them in C. Still it is the largest fixed cost of an update on a CPU: not for its instructions, but because each
object that it touches may be a cache miss. An identity touches the tensor's Python object, an address two objects more.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastswa import shards

_END = object()


class TensorWatch:
    """Which tensors a module held at one moment, and where they were.

    Replaced parameters, buffers and sub-modules show, new ones too, and tensors that got other memory (`.to()`,
    `.half()`, `parameter.data = ...`), of a DTensor this process's part. What stays at its address does not:
    `parameter.data = parameter.data[:n]`, or a transposition in place.

    Args:
        module: the module to watch. The watch keeps its tensors alive and its parts, not the module itself.
        every_address: if not, new tensors do not show, and other memory only where `.to()` and its kin gave it; for a
            module whose memory somebody else watches.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> watch = TensorWatch(layer)
        >>> layer.weight.data = torch.zeros(2, 2)
        >>> watch.unchanged()
        False
    """

    def __init__(self, module: nn.Module, every_address: bool = True) -> None:
        parts = list(module.modules())
        slots = [slot for part in parts for slot in (part._parameters, part._buffers, part._modules)]
        self._empty = [slot for slot in slots if not slot and every_address]
        self._slots: list[Iterable[Any]] = [slot.values() for slot in slots if slot]
        self._held = [*chain.from_iterable(self._slots), _END]
        if every_address:
            self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        else:
            # Module.to moves all of a part's tensors, and gives every buffer a new identity.
            firsts = (next(iter(part.parameters(recurse=False)), None) for part in parts if not part._buffers)
            self._tensors = [tensor for tensor in firsts if tensor is not None]
        self._sharded = list(filter(shards.is_sharded, self._tensors))
        self._parts = list(map(shards.held, self._sharded))
        if self._sharded:
            # A DTensor has no address of its own.
            self._tensors = [*(tensor for tensor in self._tensors if not shards.is_sharded(tensor)), *self._parts]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def unchanged(self) -> bool:
        """Whether the module holds the same tensors, in the same memory, as when the watch began."""
        # The end mark makes one tensor more or fewer a difference too.
        held = chain(chain.from_iterable(self._slots), (_END,))
        return (
            all(map(is_, held, self._held))
            and not any(self._empty)
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and (not self._sharded or all(map(is_, map(shards.held, self._sharded), self._parts)))
        )
