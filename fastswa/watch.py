"""Notice that a module's tensors were replaced or moved, without walking the module.

Walking `parameters()` costs several times more than these checks: they keep the dictionaries that hold the tensors and
read them in C, at about 15 ns a tensor for its identity and 50 ns for its address while both are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from operator import is_, is_not
from typing import Any

from torch import Tensor, nn

_END = object()


class TensorWatch:
    """Which tensors a module held at one moment, and where they were.

    Replaced parameters, buffers and sub-modules show, new ones too, and tensors that got other memory (`.to()`,
    `.half()`, `parameter.data = ...`). What stays at its address does not: `parameter.data = parameter.data[:n]`, or a
    transposition in place.

    Args:
        module: the module to watch. The watch keeps its tensors alive and its parts, not the module itself.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> watch = TensorWatch(layer)
        >>> layer.weight.data = torch.zeros(2, 2)
        >>> watch.unchanged()
        False
    """

    def __init__(self, module: nn.Module) -> None:
        slots = [slot for part in module.modules() for slot in (part._parameters, part._buffers, part._modules)]
        self._empty = [slot for slot in slots if not slot]
        self._slots: list[Iterable[Any]] = [slot.values() for slot in slots if slot]
        self._held = [*chain.from_iterable(self._slots), _END]
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def unchanged(self) -> bool:
        """Whether the module holds the same tensors, in the same memory, as when the watch began."""
        # The end mark makes one tensor more or fewer a difference too.
        held = chain(chain.from_iterable(self._slots), (_END,))
        return (
            all(map(is_, held, self._held))
            and not any(self._empty)
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )


class MemoryWatch:
    """Where all of a module's tensors were at one moment, for a module whose shapes do not change.

    A cheaper watch: a replaced tensor shows by its other address, so identities need no look of their own. Replaced
    sub-modules show too.

    Args:
        module: the module to watch. Somebody else keeps its tensors alive, or their addresses could be given out again.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> watch = MemoryWatch(layer)
        >>> layer.half().weight.dtype
        torch.float16
        >>> watch.unchanged()
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts: list[Iterable[Any]] = [part._modules.values() for part in module.modules() if part._modules]
        self._children = list(chain.from_iterable(self._parts))
        owned = [slot for part in module.modules() for slot in (part._parameters, part._buffers) if slot]
        self._slots: list[Iterable[Any]] = [
            _Present(slot) if any(map(partial(is_, None), slot.values())) else slot.values() for slot in owned
        ]
        self._addresses = self._look()

    def unchanged(self) -> bool:
        """Whether the module's tensors are the same and in the same memory as when the watch began."""
        try:
            return all(map(is_, chain.from_iterable(self._parts), self._children)) and self._look() == self._addresses
        except (TypeError, RuntimeError):  # None, or a tensor without an address, where one was
            return False

    def _look(self) -> list[int]:
        return list(map(Tensor.data_ptr, chain.from_iterable(self._slots)))


class _Present:
    """The tensors of a dictionary that also holds None, as for a layer without bias."""

    def __init__(self, slot: dict[str, Any]) -> None:
        self._slot = slot

    def __iter__(self) -> Iterator[Tensor]:
        return filter(partial(is_not, None), self._slot.values())
