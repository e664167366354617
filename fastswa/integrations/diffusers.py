"""diffusers' EMAModel with the update fused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastswa import backends
from fastswa.list_update import ListUpdate
from fastswa.module_update import tensor_refusal

try:
    from diffusers.training_utils import EMAModel as Original
    from diffusers.utils.deprecation_utils import deprecate
except ImportError as error:
    raise ImportError("fastswa.integrations.diffusers needs diffusers: pip install 'fastswa[diffusers]'") from error

SEED = 0
"""Of stochastic rounding, the same on all ranks."""


class EMAModel(Original):
    r"""An exponential moving average of parameters, in place of `diffusers.training_utils.EMAModel`.

    .. math:: s \leftarrow s + (1 - d) (p - s)

    with diffusers' decay d of the step. A subclass, so that constructor, `get_decay`, `to`, `pin_memory`,
    `save_pretrained`, `from_pretrained` and the state are those of the diffusers that is installed, and `isinstance`
    holds. In diffusers' training scripts, one import changes:

        from fastswa.integrations.diffusers import EMAModel

    It differs on purpose: bfloat16 and float16 averages are rounded once a step, at random but right on average, where
    diffusers rounds three times to nearest and small steps are lost. The bits depend on (step, element), so ranks and
    resumed runs agree. Lists of another length or of other shapes are refused in `step`, `copy_to`, `store`,
    `restore` and `load_state_dict`, which then change nothing. `foreach` changes nothing: the update is fused either
    way. Under DeepSpeed ZeRO-3, where parameters must be gathered, diffusers' own loop runs.

    `shadow_params` move into common buffers at the first step: they keep their identity, but a view of one that was
    made before follows no longer, and pinned ones are pinned no longer.

    Args:
        *args: as diffusers takes them: the parameters, then decay and so on.
        **kwargs: likewise.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
        >>> ema.step(model.parameters())
        >>> ema.store(model.parameters())
        >>> ema.copy_to(model.parameters())
        >>> prediction = model(torch.randn(8, 4))
        >>> ema.restore(model.parameters())

    References:
        diffusers 0.42, src/diffusers/training_utils.py.
    """

    # A class attribute, because diffusers' constructor calls `to` on the way.
    _update: ListUpdate | None = None
    _trained: list[bool]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the parameters' present values into the averages; those that need no gradient are copied.

        Args:
            parameters: as many as the averages, in their order. Call it after `optimizer.step()`.

        Raises:
            ValueError: other shapes or another number; nothing has been written.
        """
        if isinstance(parameters, nn.Module):
            deprecate("EMAModel.step(module)", "1.0.0", "Pass the module's parameters.", standard_warn=False)
            parameters = parameters.parameters()
        tensors = list(parameters)
        update = self._prepare(tensors)
        if update is None:
            super().step(tensors)
            return
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        self.cur_decay_value = decay  # type: ignore[assignment]  # diffusers sets it in `step` likewise
        update.lerp_(1 - decay, (SEED, self.optimization_step))

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write the averages into parameters.

        Args:
            parameters: as many as the averages, in their order.

        Raises:
            ValueError: other shapes or another number; nothing has been written.
        """
        _write("parameters", list(parameters), self.shadow_params)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of parameters on the CPU for `restore`.

        Args:
            parameters: as many as the averages, in their order.

        Raises:
            ValueError: other shapes or another number; what was stored before is kept.
        """
        tensors = list(parameters)
        _check("parameters", tensors, self.shadow_params)
        super().store(tensors)

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write what `store` kept into parameters.

        Args:
            parameters: as many as the averages, in their order.

        Raises:
            RuntimeError: nothing was stored.
            ValueError: other shapes or another number; nothing has been written.
        """
        if self.temp_stored_params is None:
            raise RuntimeError("restore: nothing is stored; call store() first")
        _write("parameters", list(parameters), self.temp_stored_params)
        self.temp_stored_params = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another run was saved, by this class or by diffusers'.

        Args:
            state_dict: as `state_dict` gave it, or what `from_pretrained` read of it, without averages.

        Raises:
            ValueError: a value of another kind, other shapes or another number of averages; nothing was loaded.
        """
        before = dict(self.__dict__)
        try:
            super().load_state_dict(state_dict)
            _check("saved averages", self.shadow_params, before["shadow_params"])
        except BaseException:
            self.__dict__.update(before)
            raise

    def _prepare(self, tensors: Sequence[Tensor]) -> ListUpdate | None:
        """The prepared update, or None where diffusers' own loop has to do it."""
        trained = [tensor.requires_grad for tensor in tensors]
        if self._update is not None and self._trained == trained and self._update.fits(self.shadow_params, tensors):
            return self._update
        # DeepSpeed's mark on a parameter that it keeps in parts.
        sharded = any(hasattr(tensor, "ds_id") for tensor in tensors)
        reasons = ["is a part under DeepSpeed"] if sharded else filter(None, map(tensor_refusal, tensors))
        for reason in reasons:
            backends.say_once(f"diffusers' own loop updates the average: a parameter is {reason}")
            return None
        frozen = [index for index, each in enumerate(trained) if not each]
        self._update = ListUpdate(self.shadow_params, tensors, copied=frozen, stochastic=True)
        self._trained = trained
        return self._update

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared holds addresses, which mean nothing in a copy.
        return {**self.__dict__, "_update": None}


def _check(what: str, tensors: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
    shapes, expected = ([tuple(tensor.shape) for tensor in each] for each in (tensors, averages))
    if len(shapes) != len(expected):
        raise ValueError(f"there are {len(shapes)} {what} for {len(expected)} averages")
    for index, (shape, other) in enumerate(zip(shapes, expected, strict=True)):
        if shape != other:
            raise ValueError(f"number {index} of the {what} has shape {shape}, but its average {other}")


@torch.no_grad()
def _write(what: str, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    _check(what, targets, values)
    if targets:
        torch._foreach_copy_(list(targets), list(values))
