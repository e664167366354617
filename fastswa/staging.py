"""Prepared updates around prepared updates: copies made before one, and several run as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastswa.updates import MultiUpdate, Update

_AnyUpdate = TypeVar("_AnyUpdate", Update, MultiUpdate)
_Pairs = list[tuple[Tensor, Tensor]]


class Staged:
    """Sources that an update can't read in place, copied before it into memory that it can."""

    def __init__(self) -> None:
        self._to: list[Tensor] = []
        self._origin: list[Tensor] = []
        self._update: Update | MultiUpdate

    def replace(self, pairs: _Pairs, unreadable: Callable[[Tensor, Tensor], bool], keep_dtype: bool) -> list[Tensor]:
        """The sources of some pairs, with a copy in the target's layout wherever one is needed."""
        sources = []
        for target, source in pairs:
            if unreadable(target, source):
                self._to.append(torch.empty_like(target, dtype=source.dtype if keep_dtype else target.dtype))
                self._origin.append(source)
                source = self._to[-1]
            sources.append(source)
        return sources

    def before(self, update: _AnyUpdate) -> _AnyUpdate:
        """The update, preceded by the copies if there are any."""
        self._update = update
        return cast("_AnyUpdate", self) if self._to else update

    def copy_(self) -> None:
        """Make the copies, if there are any."""
        if self._to:
            torch._foreach_copy_(self._to, self._origin)

    def lerp_(self, *arguments: Any) -> None:
        self.copy_()
        self._update.lerp_(*arguments)


class StagedMoments:
    """Running moments on one or several devices, as one, with the copies that they need before.

    Args:
        staged: the copies.
        moments: take a weight and a slot, for each device.
    """

    def __init__(self, staged: Staged, moments: Sequence[Callable[[float, int | None], None]]) -> None:
        self._staged = staged
        self._moments = moments

    @torch.no_grad()
    def update_(self, weight: float, slot: int | None) -> None:
        self._staged.copy_()
        for moments_ in self._moments:
            moments_(weight, slot)


class Several:
    """Updates on several devices, as one."""

    def __init__(self, updates: Sequence[Update] | Sequence[MultiUpdate]) -> None:
        self._updates = updates

    def lerp_(self, *arguments: Any) -> None:
        for update in self._updates:
            update.lerp_(*arguments)
