"""The memory of several averages of the same tensors, and their common update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastswa import backends, shards
from fastswa.flat import FlatBuffers
from fastswa.followed import Followed
from fastswa.updates import MultiUpdate


class AverageSets:
    """Sets of averages, all laid out alike in flat buffers, and one set of copies.

    Args:
        followed: the model's tensors.
        count: sets of averages.
        dtype: of real averages; None for the model's own.
        device: of averages and copies; None for the model's own.

    Raises:
        ValueError: a dtype that is not floating.
    """

    def __init__(
        self, followed: Sequence[Followed], count: int, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype or None, got {dtype}")
        averaged = [each.local for each in followed if each.averaged]
        copied = [each.local for each in followed if not each.averaged]
        self.sets = [
            [torch.empty_like(t, dtype=t.dtype if t.is_complex() else dtype, device=device) for t in averaged]
            for _ in range(count)
        ]
        """For each set the averages, in the order of the averaged tensors."""
        self._averaged = [each.averaged for each in followed]
        self._layouts = {each.name: shards.layout(each.tensor) for each in followed}
        self._numbers = shards.first_elements([each.tensor for each in followed if each.averaged])
        self.averaged_names = [each.name for each in followed if each.averaged]
        self.copied_names = [each.name for each in followed if not each.averaged]
        self.copies = [torch.empty_like(tensor, device=device) for tensor in copied]
        """Copies of the other tensors."""
        self._flats = self._flatten()

    @torch.no_grad()
    def take(self, sources: Sequence[Tensor]) -> None:
        """Make every set and the copies equal to the model's tensors.

        Args:
            sources: one for each tensor that is followed, in that order.
        """
        for own in self.sets:
            for target, source in zip(self.in_order(own), sources, strict=True):
                target.copy_(source)

    @property
    def devices(self) -> list[torch.device]:
        """Where the averages and copies are, in the order of what is followed."""
        return [tensor.device for tensor in self.in_order(self.sets[0])]

    def in_order(self, average: Sequence[Tensor]) -> list[Tensor]:
        """An average's tensors and the copies, in the order of what is followed.

        Args:
            average: a tensor for each averaged one.
        """
        averages, copies = iter(average), iter(self.copies)
        return [next(averages if averaged else copies) for averaged in self._averaged]

    @property
    def named(self) -> list[dict[str, Tensor]]:
        """For each set the averages by name, and last the copies."""
        averages = [dict(zip(self.averaged_names, own, strict=True)) for own in self.sets]
        return [*averages, dict(zip(self.copied_names, self.copies, strict=True))]

    @torch.no_grad()
    def carry_over(self, before: AverageSets) -> None:
        """Take over the averages and copies of tensors that have the name, the shape and the placement of before.

        Args:
            before: as many sets, of other tensors of the model.
        """
        alike = {name for name, layout in self._layouts.items() if before._layouts.get(name) == layout}
        for old, new in zip(before.named, self.named, strict=True):
            for name in alike & old.keys() & new.keys():
                new[name].copy_(old[name])

    def update_from(self, sources: Sequence[Tensor], backend: str) -> MultiUpdate:
        """Prepare the update from tensors in their present memory.

        Args:
            sources: one for each tensor that is followed, in that order.
            backend: "auto", "triton" or "torch".

        Returns:
            The prepared update, which holds addresses: good until a source or an average gets other memory.
        """
        if not self._flats:
            self._flats = self._flatten()
        averaged = [source for source, place in zip(sources, self._averaged, strict=True) if place]
        copied = [source for source, place in zip(sources, self._averaged, strict=True) if not place]
        # What is prepared serves later calls too, which may be outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return backends.prepare_sets(
                [list(map(_real, own)) for own in self.sets],
                list(map(_real, averaged)),
                self.copies,
                copied,
                backend,
                self._flats[:-1],
                self._flats[-1],
                self._numbers,
            )

    def _flatten(self) -> list[FlatBuffers]:
        return [FlatBuffers(own) for own in (*self.sets, self.copies)]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors have memory of their own.
        return {**self.__dict__, "_flats": []}


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def mixed(sets: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> list[Tensor]:
    """A weighted sum of sets of tensors.

    Args:
        sets: of tensors.
        coefficients: one for each set.

    Returns:
        The sum; a single set is handed out as it is.
    """
    if len(sets) == 1:
        return list(sets[0])
    sums = [torch.empty_like(tensor) for tensor in sets[0]]
    backends.combine_(list(map(_real, sums)), [list(map(_real, own)) for own in sets], coefficients)
    return sums
