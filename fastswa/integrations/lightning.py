"""Lightning: a callback in the place of WeightAveraging and EMAWeightAveraging, fused, for one average or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor

from fastswa.pairing import canonical
from fastswa.rules import EMA, Rule, recognise
from fastswa.weight_averages import ONLY, WeightAverages

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import rank_zero_info
except ImportError as error:
    raise ImportError("fastswa.integrations.lightning needs lightning: pip install 'fastswa[lightning]'") from error

SEVERAL = "weight_averages"
"""The checkpoint's key for what Lightning's callbacks have no place for."""


class FastWeightAveraging(Callback):
    r"""Averages of a LightningModule's weights, which validation, checkpoints and the end of training use.

    .. math:: a \leftarrow a + w(n) (p - a)

    It takes the place of Lightning's `WeightAveraging` (no decay) and `EMAWeightAveraging` (with decay): the same
    options, the same checkpoints, which either may resume. It is no subclass of them, because it keeps no copy of the
    module as they do, and nothing in Lightning asks for their class.

    Where results differ on purpose: an average that holds no model yet is not used, so that validation before the first
    update and the end of a run without updates see the model itself; integer buffers are copied instead of averaged,
    which fails or truncates there; the average is on the model's device even where the model moves after `setup`.
    A function of your own as `avg_fn` is left to Lightning's callbacks.

    Args:
        device: of the averages; the model's own if left out.
        use_buffers: average floating buffers too; if not, all are copied.
        decay: of an EMA, in [0, 1].
        update_every_n_steps: update after optimizer steps whose index, from 0, is a multiple; never where it is 0.
        update_starting_at_step: the first such index; 0 if left out.
        update_starting_at_epoch: update after each epoch too, from this one on, counted from 0; never if left out.
        avg_fn: what one of torch's or fastswa's `get_*_avg_fn` functions returned.
        multi_avg_fn: what one of `get_*_multi_avg_fn` returned, or a rule.
        rules: a rule, or several averages at once: a mapping name -> rule. The equal average (SWA) if nothing is given.
        used: the name of the average that validation, checkpoints and the end of training use, of several.
        **options: of WeightAverages, such as exclude, rounding or overlap. dtype is the model's own if left out.

    Raises:
        ValueError: two of decay, avg_fn, multi_avg_fn and rules; several rules without `used`.
        TypeError: a function of your own.

    Example:
        >>> averaging = FastWeightAveraging(rules={"fast": EMA(0.99), "slow": EMA(0.999)}, used="slow")
        >>> trainer = Trainer(callbacks=[averaging], max_steps=100)  # doctest: +SKIP

    References:
        Lightning 2.6, lightning/pytorch/callbacks/weight_averaging.py, for options, hooks and checkpoints.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float | None = None,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        *,
        avg_fn: Callable[..., Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        rules: Rule | Mapping[str, Rule] | None = None,
        used: str | None = None,
        **options: Any,
    ) -> None:
        if sum(given is not None for given in (decay, avg_fn, multi_avg_fn, rules)) > 1:
            raise ValueError("decay, avg_fn, multi_avg_fn and rules each say how to average; give one")
        if not isinstance(rules, Mapping):
            rule = EMA(decay) if decay is not None else recognise(rules or multi_avg_fn or avg_fn)
            if rule is None:
                raise TypeError(
                    f"{multi_avg_fn or avg_fn!r} is no rule; for a function of your own use Lightning's WeightAveraging"
                )
            rules = {ONLY: rule}
        self.rules = dict(rules)
        """The rule of each average."""
        if used not in self.rules and (used is not None or len(self.rules) != 1):
            raise ValueError(f"used must name the average to use, one of {', '.join(map(repr, rules))}; got {used!r}")
        self.used = used or next(iter(self.rules))
        """The average that validation, checkpoints and the end of training use."""
        self.averages: WeightAverages | None = None
        """The averages, from the beginning of `fit` on."""
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch
        buffers = "average" if use_buffers else "copy"
        self._options: dict[str, Any] = {"dtype": None, "buffers": buffers, "device": device, **options}
        # Lightning finds a callback's state by this name.
        self._key = "WeightAveraging" if decay is None else "EMAWeightAveraging"
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._checkpoint: Mapping[str, Any] | None = None
        self._swap = ExitStack()

    @property
    def state_key(self) -> str:
        """The name of the callback of Lightning's whose checkpoints this one shares."""
        return self._key

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update now; may be overridden, as in Lightning's callbacks.

        Args:
            step_idx: of the last optimizer step, from 0, after one.
            epoch_idx: of the last epoch, from 0, after one.
        """
        if step_idx is not None and self.update_every_n_steps > 0:
            return step_idx >= (self.update_starting_at_step or 0) and step_idx % self.update_every_n_steps == 0
        start = self.update_starting_at_epoch
        return epoch_idx is not None and start is not None and epoch_idx >= start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the averages of an earlier fit."""
        if stage == "fit":
            self.averages = self._checkpoint = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the averages of the model, which is on its device by now, or go on with those of a checkpoint."""
        self.averages = WeightAverages(pl_module, self.rules, **self._options)
        self._resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step, if it is due."""
        if trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            assert self.averages is not None
            self.averages.update()
            self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update after an epoch, if it is due."""
        if trainer.current_epoch > self._latest_update_epoch and self.should_update(epoch_idx=trainer.current_epoch):
            assert self.averages is not None
            self.averages.update()
            self._latest_update_epoch = trainer.current_epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the average into the model."""
        if self.averages is not None and self._models():
            self.averages.copy_to(name=self.used)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lend the model the average. After training it has it already."""
        if trainer.state.fn == TrainerFn.FITTING and self.averages is not None and self._models():
            self._swap.enter_context(self.averages.swapped(self.used))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its own weights back."""
        self._swap.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back."""
        self._swap.close()

    def state_dict(self) -> dict[str, Any]:
        """The callback's own state, as Lightning's callbacks have it."""
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the model's weights, and the model beside it."""
        if self.averages is None:
            rank_zero_info("FastWeightAveraging has no averages before fit; the checkpoint holds the model alone.")
            return
        own = checkpoint["state_dict"]
        average = self.averages.weights(self.used) if self._models() else {}
        checkpoint["current_model_state"] = own
        # A copy of the object, which may carry the versions of the model's layers.
        checkpoint["state_dict"] = copy(own)
        checkpoint["state_dict"].update({name: average.get(canonical(name), value) for name, value in own.items()})
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._models())}
        if not self._is_one_plain_average():
            checkpoint[SEVERAL] = self.averages.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of this callback or of Lightning's; outside of fit the model has the average."""
        if trainer.state.fn != TrainerFn.FITTING or "current_model_state" not in checkpoint:
            return
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)
        self._checkpoint = checkpoint
        # Some strategies load after `on_fit_start`.
        if self.averages is not None:
            self._resume()

    def _resume(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        assert self.averages is not None
        if checkpoint is None:
            return
        if SEVERAL in checkpoint:
            self.averages.load_state_dict(checkpoint[SEVERAL])
            return
        n = int(checkpoint["averaging_state"]["n_averaged"])
        if n == 0:
            return
        if not self._is_one_plain_average():
            raise ValueError(f"the checkpoint holds one average, which can't be resumed as {self.rules}")
        saved = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
        state = self.averages.state_dict()
        (own,) = state["averages"][self.used]
        state["averages"][self.used] = [_replaced(own, saved)]
        state["copies"] = _replaced(state["copies"], saved)
        state["counters"] = {"step": n, "n_averaged": {self.used: n}}
        self.averages.load_state_dict(state)

    def _models(self) -> int:
        assert self.averages is not None
        return self.averages.n_averaged[self.used]

    def _is_one_plain_average(self) -> bool:
        """Whether its tensors and one counter, as in Lightning's checkpoints, are the whole state."""
        return len(self.rules) == 1 and self.rules[self.used].refusal() is None


def _replaced(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Buffers that are not persistent are in no checkpoint.
    return {name: saved[name].to(tensor.dtype) if name in saved else tensor for name, tensor in own.items()}
