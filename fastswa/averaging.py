"""Averages of a selection of tensors: memory, counters and prepared update, kept right while the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastswa import backends
from fastswa.average_sets import AverageSets, mixed
from fastswa.counters import Counters
from fastswa.execution import Execution, execution
from fastswa.followed import Selection
from fastswa.rules import Rule


class Averaging:
    """The averages of a selection by some rules.

    Args:
        selection: the model's tensors.
        rules: by name.
        dtype: of real averages; None for the model's own.
        device: of the averages; None for the model's own.
        seed: of stochastic rounding; None to round to nearest.
        overlap: update on a side stream.
        capturable: count on the device.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a dtype that is not floating.
        RuntimeError: a backend that can't run here.
    """

    def __init__(
        self,
        selection: Selection,
        rules: Mapping[str, Rule],
        dtype: torch.dtype | None,
        device: torch.device | None,
        seed: int | None,
        overlap: bool,
        capturable: bool,
        backend: str,
    ) -> None:
        for place in {tensor.device for tensor in selection.tensors} if device is None else {device}:
            backends.choose(backend, place)
        self.selection = selection
        """What is averaged."""
        self.seed = seed
        """Of stochastic rounding."""
        self._copies = sum(rule.copies for rule in rules.values())
        self._dtype = dtype
        self._device = device
        self._overlap = overlap
        self._backend = backend
        self._execution: Execution | None = None
        self.sets = self._new_sets()
        """The averages' memory."""
        self.counters = Counters(rules, self.sets.sets[0][0].device, capturable)
        """Of the models in them."""
        # An average that was never updated holds the model's weights, so that it can be saved.
        self.sets.take(selection.tensors)

    def update(self, skip: Tensor | None) -> None:
        """Take the model's present values into the averages that are due.

        Args:
            skip: one element; where it is not zero, nothing happens and nothing is counted.
        """
        if self._execution is None or not self.selection.unchanged():
            self.catch_up()
            self._execution = execution(self.selection.followed, self._device, self._overlap, self._average_from)
        self._execution.update(skip)

    def wait(self) -> None:
        """Make what follows see all updates."""
        if self._execution is not None:
            self._execution.wait()

    def catch_up(self) -> None:
        """Follow tensors that were replaced or moved.

        Raises:
            ValueError: tensors that appeared, disappeared or changed their shape; names the first.
            RuntimeError: a tensor is not sharded at present; names the first.
        """
        if not self.selection.unchanged():
            self.selection.look()
            self._forget()
            if self._device is None and self.sets.devices != [tensor.device for tensor in self.selection.tensors]:
                self.take_over()

    def take_over(self) -> None:
        """Begin anew with what is selected now, and go on with the averages of tensors that are as before."""
        self._forget()
        before, self.sets = self.sets, self._new_sets()
        self.sets.take(self.selection.tensors)
        self.sets.carry_over(before)
        self.counters.move(self.sets.sets[0][0].device)

    def values(self, name: str | None) -> list[Tensor]:
        """An average's tensors and the copies, in the order of what is followed.

        Args:
            name: of the average; may be None where there is one.

        Raises:
            KeyError: no average of that name.
            RuntimeError: it holds no model yet.
        """
        sets, mixture = self.counters.find(name)
        return self.sets.in_order(mixed(self.sets.sets[sets], mixture))

    def _new_sets(self) -> AverageSets:
        return AverageSets(self.selection.followed, self._copies, self._dtype, self._device)

    def _average_from(self, sources: Sequence[Tensor]) -> Callable[[Tensor | None], None]:
        return partial(self.counters.update, self.sets.update_from(sources, self._backend), self.seed)

    def _forget(self) -> None:
        self.wait()
        self._execution = None

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy or in another process.
        self.wait()
        return {**self.__dict__, "_execution": None}
