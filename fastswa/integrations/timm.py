"""timm's ModelEmaV3 with the update fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastswa import backends
from fastswa.module_update import FlatModule, ModuleUpdate, refusal
from fastswa.updates import Random

try:
    from timm.utils.model_ema import ModelEmaV3 as Original
except ImportError as error:
    raise ImportError("fastswa.integrations.timm needs timm: pip install 'fastswa[timm]'") from error


class ModelEmaV3(Original):
    r"""An exponential moving average of a model, in place of `timm.utils.ModelEmaV3`.

    .. math:: a \leftarrow a + (1 - d) (p - a)

    with timm's decay d of the step. A subclass, so that constructor, options, `get_decay`, `forward` and `state_dict`
    are those of the timm that is installed, and `isinstance` holds. `foreach` changes nothing: the update is fused
    either way. timm's task API, which its train.py uses, takes it by name:

        timm.task.task.ModelEmaV3 = fastswa.integrations.timm.ModelEmaV3

    before `setup_ema`; a loop of one's own imports it from here, or sets `timm.utils.ModelEmaV3`.

    It differs on purpose: a tied weight moves once a step, not once for each of its names. Tensors belong together by
    name, and a model that does not match is refused before anything is written. Buffers that no state_dict holds follow
    too. With `stochastic_rounding`, float16 averages are rounded so as well as bfloat16 ones, and the bits depend on
    (seed, step, element): with `step`, a resumed run rounds as an uninterrupted one. Both are rounded once a step.

    The average's tensors move into common buffers at the first update: they keep their identity, but a view of one that
    was made before follows no longer.

    Args:
        *args: as timm takes them: the model, which is copied, then decay and so on.
        **kwargs: likewise.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
        >>> ema.update(model, step=1)
        >>> prediction = ema(torch.randn(8, 4))

    References:
        timm 1.0.31, timm/utils/model_ema.py.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._averaged: FlatModule | None = None
        self._update: ModuleUpdate | None = None
        self._calls = 0
        self._in_graph = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module.

        Args:
            *args: of the module.
            **kwargs: of the module.

        Returns:
            What the module returns.
        """
        self._in_graph = self._in_graph or torch.is_grad_enabled()
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Take the model's present weights into the average; call it after `optimizer.step()`.

        Args:
            model: the one that was copied, as it is or wrapped by DistributedDataParallel or torch.compile.
            step: the number of optimizer steps so far, for the warm-up; a constant decay without.

        Raises:
            ValueError: a model that does not match; the first tensor is named, and nothing has been written.
            TypeError: a dtype that can't be averaged.
        """
        decay = self.get_decay(step)
        number = self._calls if step is None else step
        random = (self.stochastic_rounding_seed, number) if self.stochastic_rounding else None
        if self._lerp(model, 1 - decay, random):
            self._calls += 1
        else:
            super().update(model, step)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the average equal to the model.

        Args:
            model: as `update` takes it.

        Raises:
            ValueError, TypeError: as `update` raises them.
        """
        if not self._lerp(model, 1.0, None):
            super().set(model)

    def _lerp(self, model: nn.Module, weight: float, random: Random) -> bool:
        update = self._prepare(model)
        if update is not None:
            update.lerp_(weight, random)
            if self._in_graph:
                update.invalidate_graphs()
                self._in_graph = False
        return update is not None

    def _prepare(self, model: nn.Module) -> ModuleUpdate | None:
        """The prepared update, or None where timm's own loop has to do it."""
        averaged = self._averaged
        settings = (model, not self.exclude_buffers, "auto")
        if averaged is not None and averaged.holds(self.module):
            if self._update is not None and self._update.fits(averaged, *settings):
                return self._update
        else:
            averaged = None
        reason = refusal(self.module, model)
        if reason is not None:
            backends.say_once(f"timm's own loop updates the average: {reason}")
            return None
        # What is prepared serves later calls too, which may be outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._averaged = averaged or FlatModule(self.module)
            self._update = ModuleUpdate(self._averaged, *settings, stochastic=True)
        return self._update

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy.
        return {**self.__dict__, "_averaged": None, "_update": None}
