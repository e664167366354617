"""A model that holds an average for a while, and gets its own weights back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastswa.followed import Selection


@contextmanager
def swapped_in(selection: Selection, values: Sequence[Tensor], exchange: bool) -> Iterator[None]:
    """Write an average into the followed tensors, and their own values back at the end, come what may.

    Args:
        selection: the model's tensors; all other buffers of a module get their values back too.
        values: one for each of them; a parameter's average holds its weights meanwhile where they are exchanged.
        exchange: let averages of a parameter's dtype and device change places with it, one at a time.
    """
    exchanged: list[tuple[Tensor, Tensor]] = []
    written: list[tuple[Tensor, Tensor]] = []
    for each, other in zip(selection.followed, values, strict=True):
        # Not buffers: update_bn may write them meanwhile, which is no business of the average.
        alike = exchange and not each.buffer and (each.tensor.dtype, each.tensor.device) == (other.dtype, other.device)
        (exchanged if alike else written).append((each.tensor.detach(), other))
    known = {id(each.tensor) for each in selection.followed}
    buffers = () if selection.module is None else selection.module.buffers()
    unfollowed = [buffer for buffer in buffers if id(buffer) not in known]
    done: list[tuple[Tensor, Tensor]] = []
    with restored([*(own for own, _ in written), *unfollowed]):
        try:
            with torch.no_grad():
                for own, other in exchanged:
                    _exchange(own, other, done)
                for own, other in written:
                    own.copy_(other)
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                for own, other in done.copy():
                    _exchange(own, other, [])


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their present values back at the end, bit for bit, come what may.

    Args:
        tensors: of any dtype, that are written meanwhile.
    """
    with torch.no_grad():
        kept = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        # Autocast would go on with its converted copies of other weights until its context ends.
        torch.clear_autocast_cache()


def _exchange(own: Tensor, other: Tensor, done: list[tuple[Tensor, Tensor]]) -> None:
    value = own.clone()
    done.append((own, other))
    # Both happen or, as far as an interrupt between two steps goes, both are undone by another exchange.
    try:
        own.copy_(other)
    finally:
        other.copy_(value)
