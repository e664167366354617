"""A module kept as another's average by code that chooses tensors and weights itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastswa.module_update import FlatModule, ModuleUpdate, Sort, check_values, refusal


class ModuleFollower:
    """Moves a module's tensors towards a model's; prepared at the first update, and again whenever either changed.

    Args:
        backend: as `backends.choose` takes it.

    Example:
        >>> from fastswa.module_update import sort_pairs
        >>> average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> follower = ModuleFollower()
        >>> follower.lerp_(average, model, 1.0, lambda average, model: sort_pairs(average, model, use_buffers=True))
        >>> torch.equal(average.weight, model.weight)
        True
    """

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend
        self._averaged: FlatModule | None = None
        self._update: ModuleUpdate | None = None
        self._selection: object = None

    def lerp_(
        self, averaged: nn.Module, model: nn.Module, weight: float | Tensor, sort: Sort, selection: object = None
    ) -> None:
        """Move the averages towards the model by a weight, and copy what is copied.

        Args:
            averaged: the module whose tensors are averages; they are moved into flat buffers.
            model: the module that is being trained.
            weight: in [0, 1]: a float, or a 0-dimensional tensor on the averages' device.
            sort: chooses the pairs, by `module_update.divide`.
            selection: what the choice depends on; when it is no longer equal, `sort` is asked again.

        Raises:
            ValueError: the modules do not pair; names the first tensor. Nothing has been written.
            TypeError: a tensor that can't be averaged; names it. Nothing has been written.
        """
        if not (self._holds(averaged) and self._fits(model, selection)):
            self._prepare(averaged, model, sort)
            self._selection = selection
        assert self._update is not None  # just prepared, or it fits
        with torch.no_grad():
            self._update.lerp_(weight)

    def _holds(self, averaged: nn.Module) -> bool:
        return self._averaged is not None and self._averaged.holds(averaged)

    def _fits(self, model: nn.Module, selection: object) -> bool:
        flat, update = self._averaged, self._update
        fits = flat is not None and update is not None and update.fits(flat, model, True, self._backend)
        return fits and self._selection == selection

    def _prepare(self, averaged: nn.Module, model: nn.Module, sort: Sort) -> None:
        check_values(averaged, "the averaged module")
        check_values(model, "the model")
        reason = refusal(averaged, model)
        if reason is not None:
            raise TypeError(f"the update can't be fused: {reason}; use the library's own class")
        # Before anything is moved, so that a refusal leaves everything as it was.
        sort(averaged, model)
        # What is prepared serves later calls too, which may be outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._averaged is None or not self._holds(averaged):
                self._averaged = FlatModule(averaged)
            self._update = ModuleUpdate(self._averaged, model, True, self._backend, sort)

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy or in another process.
        return {**self.__dict__, "_averaged": None, "_update": None}
