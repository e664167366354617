"""pytorch-ignite's EMAHandler with the update fused, for other rules than an EMA too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastswa.module_follower import ModuleFollower
from fastswa.module_update import divide, sort_pairs
from fastswa.pairing import Pair, pair_parameters
from fastswa.rules import Rule

try:
    from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
    from ignite.handlers import EMAHandler as Original
    from ignite.handlers.state_param_scheduler import LambdaStateScheduler
except ImportError as error:
    raise ImportError("fastswa.integrations.ignite needs pytorch-ignite: pip install 'fastswa[ignite]'") from error


class EMAHandler(Original):
    r"""An average of a model, updated at an event of an engine, in place of `ignite.handlers.EMAHandler`.

    .. math:: a \leftarrow a + \lambda (p - a)

    with the momentum :math:`\lambda` that stands in `engine.state` under a name, or with the weight of a rule, which is
    written there. A subclass, so that arguments and attributes are those of the ignite that is installed, and
    `isinstance` holds. As there, the average begins as a copy of the model, and `ema_model` is what is saved; a rule
    goes on exactly only if the handler, which has a `state_dict`, is saved beside it.

    It differs on purpose: the warm-up goes to the name that `attach` is given, where ignite's always goes to
    "ema_momentum"; copied buffers have memory of their own, where ignite's become the model's. Tensors belong together
    by name, and a model that does not match is refused before anything is written.

    The average's tensors move into common buffers at the first update: they keep their identity, but a view of one that
    was made before follows no longer.

    Args:
        model: the model; inside DistributedDataParallel, the module that it wraps.
        momentum: of the EMA after the warm-up, in (0, 1).
        momentum_warmup: at the first update; it changes linearly from there.
        warmup_iters: updates that this takes.
        handle_buffers: "copy" the model's; "update" averages floating ones and copies the others; "ema_train" leaves
            them to the average's own forward passes, in training mode.
        rule: such as SWA(), instead of a momentum; its first update replaces the average.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".

    Raises:
        ValueError: a momentum out of its range; a warm-up beside a rule; an unknown handle_buffers.
        TypeError: a rule that WeightAverages alone serves, such as one with `every=2`; let the event say so.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> handler = EMAHandler(model, momentum=0.002)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> handler.attach(trainer, name="ema_momentum", event=Events.ITERATION_COMPLETED(every=5))
        >>> trainer.run(range(10)).ema_momentum
        0.002

    References:
        pytorch-ignite 0.5.5, ignite/handlers/ema_handler.py.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: str = "copy",
        *,
        rule: Rule | None = None,
        backend: str = "auto",
    ) -> None:
        if rule is not None and momentum_warmup is not None:
            raise ValueError("a rule takes no momentum_warmup; for a warm-up give EMA(decay, warmup=...) as rule")
        reason = None if rule is None else rule.refusal()
        if reason is not None:
            raise TypeError(reason)
        super().__init__(model, momentum, momentum_warmup, warmup_iters, handle_buffers)
        # Taken from ignite's attach, which knows one name for it.
        self._warmup, self._momentum_lambda_obj = self._momentum_lambda_obj, None
        self._follower = ModuleFollower(backend)
        self.rule = rule
        """The rule, or None where a momentum decides."""
        self.n_averaged = 0
        """Updates so far."""

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: str | Events | CallableEventWithFilter | EventsList = Events.ITERATION_COMPLETED,
    ) -> None:
        """Update the average at an event of an engine.

        Args:
            engine: the trainer.
            name: of the momentum in `engine.state`; one for each handler.
            warn_if_exists: warn if there is such a name, as there is after resuming.
            event: when to update.
        """
        exists = hasattr(engine.state, name)
        if self._warmup is not None:
            if not exists:
                setattr(engine.state, name, self.momentum)
            # Before the update, so that it takes the momentum of its own step.
            self.momentum_scheduler = LambdaStateScheduler(self._warmup, param_name=name)
            self.momentum_scheduler.attach(engine, event)
        super().attach(engine, name, warn_if_exists and exists, event)

    def state_dict(self) -> dict[str, Any]:
        """What a rule needs beside `ema_model` to go on."""
        return {"n_averaged": self.n_averaged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave.

        Args:
            state_dict: as `state_dict` gave it.
        """
        self.n_averaged = int(state_dict["n_averaged"])

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        if self.rule is not None:
            setattr(engine.state, name, self.rule.copy_weights(self.n_averaged)[0])
        momentum = getattr(engine.state, name)
        self._follower.lerp_(self.ema_model, self.model, momentum, self._sort, self.handle_buffers)
        self.n_averaged += 1

    def _sort(self, averaged: nn.Module, model: nn.Module) -> tuple[list[Pair], list[Pair]]:
        if self.handle_buffers == "ema_train":
            return divide(pair_parameters(averaged, model))
        return sort_pairs(averaged, model, use_buffers=self.handle_buffers == "update")
