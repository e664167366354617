"""A model that holds an average for a while, and gets its own weights back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastswa.followed import Followed


@contextmanager
def swapped_in(
    followed: Sequence[Followed],
    average: Sequence[Tensor],
    copies: Sequence[Tensor],
    exchange: bool,
    module: nn.Module | None,
) -> Iterator[None]:
    """Write an average into the followed tensors, and their own values back at the end, come what may.

    Args:
        followed: the model's tensors.
        average: of the averaged ones, in their order; holds the model's weights meanwhile where it is exchanged.
        copies: of the others, in their order.
        exchange: let averages of a parameter's dtype and device change places with it, one at a time.
        module: whose other buffers get their values back too.
    """
    averages, others = iter(average), iter(copies)
    pairs = [(each, next(averages if each.averaged else others)) for each in followed]
    exchanged: list[tuple[Tensor, Tensor]] = []
    written: list[tuple[Tensor, Tensor]] = []
    for each, other in pairs:
        # Not buffers: update_bn may write them meanwhile, which is no business of the average.
        alike = exchange and not each.buffer and (each.tensor.dtype, each.tensor.device) == (other.dtype, other.device)
        (exchanged if alike else written).append((each.tensor.detach(), other))
    known = {id(each.tensor) for each in followed}
    unfollowed = [] if module is None else [buffer for buffer in module.buffers() if id(buffer) not in known]
    done: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        kept = [(own, own.clone()) for own in (*(own for own, _ in written), *unfollowed)]
    try:
        with torch.no_grad():
            for own, other in exchanged:
                _exchange(own, other, done)
            for own, other in written:
                own.copy_(other)
        yield
    finally:
        with torch.no_grad():
            for own, other in done.copy():
                _exchange(own, other, [])
            for own, value in kept:
                own.copy_(value)


def _exchange(own: Tensor, other: Tensor, done: list[tuple[Tensor, Tensor]]) -> None:
    value = own.clone()
    done.append((own, other))
    # Both happen or, as far as an interrupt between two steps goes, both are undone by another exchange.
    try:
        own.copy_(other)
    finally:
        other.copy_(value)
