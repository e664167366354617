"""Running moments in plain torch, and samples of the normal distribution that they describe.

Each takes several operations, and whole tensors would travel from memory and back for every one of them. Here a few
tensors, or a piece of a large one, stay in the cache until all operations are done: what moves is 20 bytes for each
element of float32, 4 more for the deviation, and 12 + 4 K for a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastswa_kernels.arguments import check_weight
from fastswa_kernels.moments_arguments import check_slot
from fastswa_kernels.normal import normal
from fastswa_kernels.pairs import dense_view, distinct, same_layout

PIECE = {"cpu": 1 << 18}
"""Elements worked on at once: on a CPU 1 MB of float32 for each list. Fewer cost more calls, more leave the cache."""


class TorchMoments:
    r"""A prepared update of running moments of fixed tensors.

    .. math::
        d = p - \mu, \qquad \mu \leftarrow \mu + w d, \qquad
        \sigma^2 \leftarrow (1 - w)(\sigma^2 + w d^2), \qquad \delta_k \leftarrow (1 - w)\, d

    `fastswa_kernels.reference.moments_` is the specification. The caller has checked the lists.

    Args:
        means: real floating tensors on one device; written.
        variances: one for each mean, of its shape and dtype; written.
        sources: one for each mean, of its shape; any floating dtype and strides; read.
        deviations: the slots of a ring, lists like the variances; each call writes one of them or none.
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        sources: Sequence[Tensor],
        deviations: Sequence[Sequence[Tensor]],
    ) -> None:
        lists = [means, variances, sources, *deviations]
        self._groups = list(_groups(lists))
        self._slots = len(deviations)
        rooms = _Rooms()
        self._rooms = [
            (rooms.like(group, compute), rooms.like(group, compute, other=True))
            for group in self._groups
            for compute in [_compute_dtype(group.lists[0][0], group.lists[2][0])]
        ]

    @torch.no_grad()
    def moments_(self, weight: float, slot: int | None = None) -> None:
        """Run the update.

        Args:
            weight: in [0, 1].
            slot: of the ring, to be overwritten; None writes none.

        Raises:
            ValueError: a weight outside [0, 1], no such slot.
            TypeError: numbers of other types. Nothing has been written in any of these cases.
        """
        check_weight(weight)
        check_slot(slot, self._slots)
        for group, (distance, spread) in zip(self._groups, self._rooms, strict=True):
            means, variances, sources, *ring = group.lists
            deviations = None if slot is None else ring[slot]
            if weight == 1:
                # Not arithmetic: 0 * NaN would keep a NaN that stood there.
                torch._foreach_copy_(means, sources)
                torch._foreach_zero_(variances)
                if deviations is not None:
                    torch._foreach_zero_(deviations)
                continue
            compute = distance.flat.dtype
            # As the arithmetic holds it, so that 1 - w is its counterpart.
            w = weight if compute == torch.float64 else float(np.float32(weight))
            torch._foreach_copy_(distance.views, sources)
            torch._foreach_sub_(distance.views, means)
            if w < 0.5 or means[0].dtype != compute:
                torch._foreach_add_(means, distance.views, alpha=w)
            else:
                torch._foreach_copy_(means, sources)
                torch._foreach_sub_(means, distance.views, alpha=1 - w)
            if variances[0].dtype == compute:
                torch._foreach_addcmul_(variances, distance.views, distance.views, value=w)
                torch._foreach_mul_(variances, 1 - w)
            else:
                torch._foreach_copy_(spread.views, variances)
                spread.flat.addcmul_(distance.flat, distance.flat, value=w).mul_(1 - w)
                torch._foreach_copy_(variances, spread.views)
            if deviations is not None:
                distance.flat.mul_(1 - w)
                torch._foreach_copy_(deviations, distance.views)


@torch.no_grad()
def sample_(
    targets: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    deviations: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    diagonal: float,
    seed: int,
    step: int,
) -> None:
    r"""Draw from a normal distribution whose covariance is a diagonal and a matrix of low rank.

    .. math:: t_i \leftarrow \mu_i + s\, \sigma_i z_i + \sum_{k:\, c_k \ne 0} c_k \delta_{ki}

    `fastswa_kernels.reference.sample_` is the specification. The caller has checked the arguments.

    Args:
        targets: real floating tensors of any device; written.
        means: one for each target, of its shape; any floating dtype; read.
        variances: one for each mean, of its dtype and device; read where `diagonal` is not 0.
        deviations: K lists like the means; read where their coefficient is not 0.
        coefficients: K floats.
        diagonal: factor of the standard deviations.
        seed: of the numbers.
        step: of the numbers.
    """
    read = [tensors for tensors, factor in zip(deviations, coefficients, strict=True) if factor != 0]
    factors = [float(factor) for factor in coefficients if factor != 0]
    rooms = _Rooms()
    for group in _groups([means, variances, targets, *read]):
        own_means, own_variances, own_targets, *own_deviations = group.lists
        added = rooms.like(group, _compute_dtype(own_means[0], own_targets[0]))
        if diagonal:
            torch._foreach_copy_(added.views, own_variances)
            z = normal(group.first, added.flat.numel(), seed, step, added.flat.device)
            added.flat.sqrt_().mul_(float(diagonal)).mul_(z)
        else:
            added.flat.zero_()
        for tensors, factor in zip(own_deviations, factors, strict=True):
            torch._foreach_add_(added.views, tensors, alpha=factor)
        torch._foreach_add_(added.views, own_means)
        torch._foreach_copy_(own_targets, added.views)


@dataclass(frozen=True)
class _Group:
    """The same elements of several lists, to be worked on at once.

    Args:
        lists: of pieces, or of whole tensors that can't be cut; dtypes are the same throughout a list.
        first: number of the first element, from which they are numbered through.
    """

    lists: list[list[Tensor]]
    first: int


@dataclass(frozen=True)
class _Room:
    """Memory to compute in: one tensor of one dimension, and views of it like the tensors of a list."""

    flat: Tensor
    views: list[Tensor]


class _Rooms:
    """One memory for each device, dtype and use, since groups come one after another."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}

    def like(self, group: _Group, dtype: torch.dtype, other: bool = False) -> _Room:
        tensors = group.lists[0]
        key = tensors[0].device, dtype, other
        ends = list(accumulate((tensor.numel() for tensor in tensors), initial=0))
        memory = self._memory.get(key)
        if memory is None or len(memory) < ends[-1]:
            memory = self._memory[key] = torch.empty(ends[-1], dtype=dtype, device=tensors[0].device)
        # Each in the order of its own memory, in which elements are numbered.
        views = [
            memory[start:].as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
            for tensor, start in zip(tensors, ends[:-1], strict=True)
        ]
        return _Room(memory[: ends[-1]], views)


def _groups(lists: Sequence[Sequence[Tensor]]) -> Iterator[_Group]:
    """Rows of all lists, cut where they are long and put together where they are short; tied rows once."""
    numbers = list(accumulate((tensor.numel() for tensor in lists[0]), initial=0))
    rows: list[tuple[Tensor, ...]] = []
    first = end = 0
    for index in distinct(*lists):
        number = numbers[index]
        for row in _pieces(tuple(tensors[index] for tensors in lists)):
            size = row[0].numel()
            if rows and (number != end or _kinds(row) != _kinds(rows[0]) or end + size - first > _piece(row[0])):
                yield _Group([list(column) for column in zip(*rows, strict=True)], first)
                rows = []
            if not rows:
                first = number
            rows.append(row)
            number = end = number + size
    if rows:
        yield _Group([list(column) for column in zip(*rows, strict=True)], first)


def _pieces(row: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """One-dimensional pieces that fit the cache, or the row as it is where it fits or its layouts forbid."""
    size, count = _piece(row[0]), row[0].numel()
    views = [] if count <= size else [dense_view(tensor) for tensor in row]
    if not views or any(
        view is None or not same_layout(tensor, row[0]) for view, tensor in zip(views, row, strict=True)
    ):
        yield row
        return
    for start in range(0, count, size):
        yield tuple(view[start : start + size] for view in views if view is not None)


def _piece(tensor: Tensor) -> int:
    return PIECE.get(tensor.device.type, 1 << 24)


def _kinds(row: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    return [(tensor.dtype, tensor.device) for tensor in row]


def _compute_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
