"""Weighted sums of lists of tensors in plain torch, in pieces that fit the cache.

A sum in float64 of whole tensors moves 36 bytes for each element of a float32 term, most of them to temporaries and
back. Here a piece's sum stays in the cache until all its terms are added, and what moves is the terms' own 4 bytes.
Small tensors are laid end to end first, because a CPU spends longer to reach one than to add it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors, unflatten_dense_tensors

from fastswa.stretches import GATHER, SMALL
from fastswa_kernels.pairs import dense_view, same_layout

PIECE = 1 << 18
"""Elements summed at once: 2 MB for the sum and 2 MB for a term, both in float64."""

_Row = tuple[Tensor, ...]
"""A target and its sources."""


def combine_(targets: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    r"""Make each target a weighted sum of its sources.

    .. math:: t_i \leftarrow \sum_{k:\, c_k \ne 0} c_k\, p_{ki}

    `fastswa_kernels.reference.combine_` is the specification. The caller has checked the lists, left one of each tied
    target, and turned gradients off.

    Args:
        targets: real floating tensors on one device, one at least; written.
        sources: N lists; sources[k][i] is of the shape of targets[i]; any floating dtype, strides and device; read.
        coefficients: one for each list.
    """
    read = [tensors for tensors, value in zip(sources, coefficients, strict=True) if value != 0]
    factors = [float(value) for value in coefficients if value != 0]
    if not read:
        torch._foreach_zero_(list(targets))
        return
    rooms = torch.empty(2, PIECE, dtype=torch.float64, device=targets[0].device)
    small: dict[tuple[object, ...], list[_Row]] = {}
    for row in zip(targets, *read, strict=True):
        if row[0].numel() <= SMALL:
            small.setdefault((row[0].dtype, row[1].dtype, row[1].device), []).append(row)
        else:
            for target, *terms in _cut(_in_memory_order(row)):
                target.copy_(_total(terms, factors, rooms))
    for rows in small.values():
        for run in _runs(rows):
            own, *columns = zip(*run, strict=True)
            total = _total([flatten_dense_tensors(list(column)) for column in columns], factors, rooms)
            torch._foreach_copy_(own, unflatten_dense_tensors(total.to(own[0].dtype), list(own)))


def _total(terms: Sequence[Tensor], factors: Sequence[float], rooms: Tensor) -> Tensor:
    total, wide = torch.unbind(rooms[:, : terms[0].numel()].view(2, *terms[0].shape))
    # From the first term on: 0 + -0 would be 0.
    total.copy_(terms[0])
    if factors[0] != 1:
        total.mul_(factors[0])
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        total.add_(wide.copy_(term), alpha=factor)
    return total


def _in_memory_order(row: _Row) -> _Row:
    """One-dimensional views of a row's elements in their order in memory, where that is one for all."""
    views = [dense_view(tensor) for tensor in row]
    if all(view is not None and same_layout(tensor, row[0]) for view, tensor in zip(views, row, strict=True)):
        return tuple(view for view in views if view is not None)
    return row


def _cut(row: _Row) -> Iterator[_Row]:
    """The same parts of all tensors of a row, none of more elements than PIECE."""
    count = row[0].numel()
    if count <= PIECE:
        yield row
        return
    size, dim = max((size, -dim) for dim, size in enumerate(row[0].shape))
    at_once = max(1, PIECE * size // count)
    for part in zip(*(torch.split(tensor, at_once, -dim) for tensor in row), strict=True):
        yield from _cut(part)


def _runs(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows in groups that torch.cat lays end to end in one loop, without a dispatch for each tensor."""
    run: list[_Row] = []
    count = 0
    for row in rows:
        count += row[0].numel()
        if count > GATHER and run:
            yield run
            run, count = [], row[0].numel()
        run.append(row)
    if run:
        yield run
