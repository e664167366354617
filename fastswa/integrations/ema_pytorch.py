"""ema-pytorch's EMA with the update fused, and without its reads of the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastswa.module_follower import ModuleFollower
from fastswa.module_update import divide
from fastswa.pairing import Pair, pair_names
from fastswa.unprepared import copy_pairs, lerp_pairs
from fastswa.warmups import InversePowerWarmup


class EMA(nn.Module):
    r"""An exponential moving average of a model, in place of `ema_pytorch.EMA`.

    .. math:: a \leftarrow a + (1 - d) (p - a), \qquad
        d = \max\left(d_{\min}, \min\left(\beta, 1 - (1 + s / \gamma)^{-p}\right)\right)

    at every `update_every`-th call, where s are the calls since `update_after_step`; before that the model is copied.
    The same arguments in the same order, methods, attributes and `state_dict` as ema-pytorch 0.8.3, loadable in both
    directions; it is no subclass, so that ema-pytorch need not be installed.

    It differs on purpose: integer buffers are copied. The decay is computed in float64 on the host, by a count there,
    so that no update waits for the device; `step` and `initted` are read when somebody else has written them. Tensors
    belong together by name, and a model that does not match is refused before anything is written. `forward_eval` does
    use evaluation mode. A model that can't be copied raises instead of ending the process. Trees other than modules
    are not averaged: see `fastswa.WeightAverages`, also in place of `PostHocEMA` (`PowerEMA` rules, then
    `fastswa.synthesize`).

    The average's tensors move into common buffers at the first update: a view of one that was made before follows no
    longer.

    Args:
        model: the model to average.
        ema_model: a module for the average, or a function that makes it; a copy of the model if left out.
        beta: the largest decay, in [0, 1]; 1 freezes the average.
        update_after_step: calls before which the model is copied.
        update_every: calls from one update to the next.
        inv_gamma: gamma, above 0.
        power: p, above 0.
        min_value: the smallest decay, in [0, 1].
        param_or_buffer_names_no_ema: names of tensors that are copied, not averaged.
        ignore_names: names of tensors that updates leave alone.
        ignore_startswith_names: beginnings of such names.
        include_online_model: make the model a part of this module, so that the `state_dict` has it too.
        allow_different_devices, use_foreach, coerce_dtype: change nothing; devices and dtypes may always differ.
        update_model_with_ema_every: calls from one return of the average into the model to the next.
        update_model_with_ema_beta: what the model keeps of itself then, in [0, 1].
        forward_method_names: methods of the averaged module that this one gets.
        move_ema_to_online_device: let the average follow the model to its device.
        lazy_init_ema: make the average at the first update.

    Raises:
        TypeError: a model that is no module.
        ValueError: a value out of its range; `ema_model` together with `lazy_init_ema`.
        RuntimeError: a model that can't be copied.

    Example:
        >>> from fastswa.integrations.ema_pytorch import EMA
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = EMA(model, beta=0.999, update_after_step=0, update_every=1)
        >>> ema.update()
        >>> prediction = ema(torch.randn(8, 4))

    References:
        ema-pytorch 0.8.3, ema_pytorch/ema_pytorch.py.
    """

    initted: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: Collection[str] = frozenset(),
        ignore_names: Collection[str] = frozenset(),
        ignore_startswith_names: Collection[str] = frozenset(),
        include_online_model: bool = True,
        allow_different_devices: bool = False,
        use_foreach: bool = False,
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: tuple[str, ...] = (),
        move_ema_to_online_device: bool = False,
        coerce_dtype: bool = False,
        lazy_init_ema: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model is a {type(model).__name__}; average a tree of tensors by fastswa.WeightAverages"
            )
        if lazy_init_ema and ema_model is not None:
            raise ValueError("give ema_model or lazy_init_ema, not both")
        self.online_model = model if include_online_model else [model]
        self.include_online_model = include_online_model
        self.beta = beta
        self.is_frozen = beta == 1.0
        self.update_after_step = update_after_step
        self.update_every = update_every
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self.param_or_buffer_names_no_ema = param_or_buffer_names_no_ema
        self.ignore_names = ignore_names
        self.ignore_startswith_names = ignore_startswith_names
        self.allow_different_devices = allow_different_devices
        self.use_foreach = use_foreach
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.forward_method_names = forward_method_names
        self.move_ema_to_online_device = move_ema_to_online_device
        self.coerce_dtype = coerce_dtype
        self._decay_after(0)
        self._follower = ModuleFollower()
        # What the host knows of a buffer: the buffer, how often it had been written, and its value.
        self._known: dict[str, tuple[Tensor, int, int]] = {}
        self.ema_model: Any = None
        if not lazy_init_ema:
            self.init_ema(ema_model if isinstance(ema_model, nn.Module) or ema_model is None else ema_model())
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    def init_ema(self, ema_model: nn.Module | None = None) -> None:
        """Make the average.

        Args:
            ema_model: to hold it; a copy of the model if left out.

        Raises:
            RuntimeError: a model that can't be copied.
        """
        if ema_model is None:
            try:
                ema_model = deepcopy(self.model)
            except Exception as error:
                raise RuntimeError(f"the model can't be deep-copied: {error}. Pass ema_model=") from error
        self.ema_model = ema_model.requires_grad_(False)
        for name in self.forward_method_names:
            setattr(self, name, getattr(ema_model, name))

    @property
    def model(self) -> nn.Module:
        """The model that is averaged."""
        model: nn.Module = self.online_model if self.include_online_model else self.online_model[0]  # type: ignore
        return model

    def update(self) -> None:
        """Take the model's present weights into the average if it is time; call it after each `optimizer.step()`.

        Raises:
            ValueError: tensors that the model has not, or has in another shape; nothing has been written or counted.
            TypeError: a tensor that can't be averaged; nothing has been written or counted.
        """
        step = self._read("step")
        if not self._read("initted"):
            if self.ema_model is None:
                self.init_ema()
            self.copy_params_from_model_to_ema()
            self._write("initted", 1)
        elif step % self.update_every == 0 and step <= self.update_after_step:
            self.copy_params_from_model_to_ema()
        else:
            if step % self.update_every == 0:
                self.update_moving_average(self.ema_model, self.model, self._decay_after(step))
            every = self.update_model_with_ema_every
            if every is not None and step % every == 0:
                self.update_model_with_ema()
        self._write("step", step + 1)

    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Move one module's tensors towards another's.

        Args:
            ma_model: written.
            current_model: read.
            current_decay: what `ma_model` keeps of itself, in [0, 1]; that of the present step if left out.
        """
        if self.is_frozen:
            return
        weight = 1 - (self.get_current_decay() if current_decay is None else current_decay)
        if ma_model is not self.ema_model:
            # The model's memory is not ours to move.
            lerps, copies = self._sort(ma_model, current_model)
            lerp_pairs(lerps, weight)
            copy_pairs(copies)
            return
        device = next(current_model.parameters()).device
        if self.move_ema_to_online_device and next(ma_model.parameters()).device != device:
            ma_model.to(device)
        names = (self.param_or_buffer_names_no_ema, self.ignore_names, self.ignore_startswith_names)
        self._follower.lerp_(ma_model, current_model, weight, self._sort, tuple(map(frozenset, names)))

    def get_current_decay(self) -> float:
        """The decay of the update after which `step` was counted."""
        return self._decay_after(self._read("step") - 1)

    def copy_params_from_model_to_ema(self) -> None:
        """Make the average equal to the model, its integer buffers too."""
        copy_pairs(pair_names(_tensors(self.ema_model, tied=False), _tensors(self.model)))

    def copy_params_from_ema_to_model(self) -> None:
        """Write the average into the model, but for integers."""
        pairs = pair_names(_tensors(self.model, tied=False), _tensors(self.ema_model))
        copy_pairs([pair for pair in pairs if _is_inexact(pair.average)])

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Move the model towards its average.

        Args:
            decay: what the model keeps of itself; `update_model_with_ema_beta` if left out. 0 copies.
        """
        decay = self.update_model_with_ema_beta if decay is None else decay
        if decay == 0:
            self.copy_params_from_ema_to_model()
        else:
            self.update_moving_average(self.model, self.ema_model, decay)

    def add_to_optimizer_post_step_hook(self, optimizer: torch.optim.Optimizer) -> Any:
        """Let an optimizer call `update` after each of its steps; gives the hook's handle."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    def restore_ema_model_device(self) -> None:
        """Move the average to this module's device."""
        self.ema_model.to(self.initted.device)

    def eval(self) -> Any:
        """Turn evaluation mode on in the averaged module alone, and return that."""
        return self.ema_model.eval()

    @torch.no_grad()
    def forward_eval(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module in evaluation mode, without gradients."""
        modes = [(part, part.training) for part in self.ema_model.modules()]
        try:
            return self.ema_model.eval()(*args, **kwargs)
        finally:
            for part, training in modes:
                part.training = training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module."""
        return self.ema_model(*args, **kwargs)

    def _decay_after(self, step: int) -> float:
        warmup = InversePowerWarmup(self.inv_gamma, self.power, self.min_value)
        return float(warmup.decay(step - self.update_after_step, self.beta))

    def _sort(self, averaged: nn.Module, model: nn.Module) -> tuple[list[Pair], list[Pair]]:
        beginnings = tuple(self.ignore_startswith_names)
        chosen = {
            name: tensor
            for name, tensor in _tensors(averaged, tied=False).items()
            if not (name in self.ignore_names or name.startswith(beginnings))
            # Integers come from the model, never back.
            and (averaged is self.ema_model or _is_inexact(tensor))
        }
        return divide(pair_names(chosen, _tensors(model)), self.param_or_buffer_names_no_ema)

    def _read(self, name: str) -> int:
        buffer: Tensor = getattr(self, name)
        known, version, value = self._known.get(name, (None, 0, 0))
        if known is not buffer or version != buffer._version:
            value = int(buffer)
            self._known[name] = buffer, buffer._version, value
        return value

    def _write(self, name: str, value: int) -> None:
        buffer = getattr(self, name).fill_(value)
        self._known[name] = buffer, buffer._version, value


def _tensors(module: nn.Module, tied: bool = True) -> dict[str, Tensor]:
    """By name; tied ones under each of theirs, or under the first."""
    found = nn.Module.named_parameters, nn.Module.named_buffers
    return {name: tensor for named in found for name, tensor in named(module, remove_duplicate=not tied)}


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
