"""A model that holds an average for a while, and gets its own weights back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastswa import shards
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
        own = each.local
        alike = exchange and not each.buffer and (own.dtype, own.device) == (other.dtype, other.device)
        (exchanged if alike else written).append((each.tensor, other))
    known = {id(each.tensor) for each in selection.followed}
    buffers = () if selection.module is None else selection.module.buffers()
    unfollowed = [buffer for buffer in buffers if id(buffer) not in known]
    done: list[tuple[Tensor, Tensor]] = []
    with restored([*(tensor for tensor, _ in written), *unfollowed]):
        try:
            with torch.no_grad():
                for tensor, other in exchanged:
                    _exchange(tensor, other, done)
                for tensor, other in written:
                    shards.local(tensor).copy_(other)
            torch.clear_autocast_cache()
            yield
        finally:
            try:
                # After a forward pass FSDP2 keeps the root's whole parameters, here the average's, for the next pass.
                if selection.module is not None and any(shards.is_sharded(each.tensor) for each in selection.followed):
                    shards.reshard(selection.module)
            finally:
                with torch.no_grad():
                    for tensor, other in done.copy():
                        _exchange(tensor, other, [])


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their present values back at the end, bit for bit, come what may.

    Args:
        tensors: of any dtype, that are written meanwhile.
    """
    with torch.no_grad():
        kept = [(tensor, shards.local(tensor).clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                # FSDP2's first forward pass may have moved the part.
                shards.local(tensor).copy_(value)
        # Autocast would go on with its converted copies of other weights until its context ends.
        torch.clear_autocast_cache()


def _exchange(tensor: Tensor, other: Tensor, done: list[tuple[Tensor, Tensor]]) -> None:
    own = shards.local(tensor)
    value = own.clone()
    done.append((tensor, other))
    # Both happen or, as far as an interrupt between two steps goes, both are undone by another exchange.
    try:
        own.copy_(other)
    finally:
        other.copy_(value)
