"""A callback for transformers' Trainer: averages that evaluation, checkpoints and the end of training use."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastswa.average_state import different_tensors
from fastswa.counters import check_rules
from fastswa.pairing import canonical
from fastswa.rules import Rule
from fastswa.weight_averages import ONLY, WeightAverages

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("fastswa.integrations.transformers needs it: pip install 'fastswa[transformers]'") from error

FILE = "averages.pt"
"""The file in each checkpoint's folder: the averages, and the weights that training goes on with."""
MARK = "fastswa"
"""The key in trainer_state.json that says which file belongs to it."""


class WeightAveragingCallback(TrainerCallback):
    r"""Averages of the model's weights, updated after each optimizer step of transformers' Trainer.

    .. math:: a \leftarrow a + w(n) (p - a)

    Evaluation, checkpoints (their model files, and so the best model) and the model at the end of training are the
    average, once it holds a model. Beside each checkpoint's model stands `averages.pt`, with which
    `train(resume_from_checkpoint=...)` goes on exactly: the averages, their counters, and the weights themselves.
    Accumulated gradients count as one step, and a step that a GradScaler skips as none.

    Callbacks that ask for an evaluation or a checkpoint at the end of a step must come before it in the Trainer's list.
    `trainer.evaluate()` of one's own in the course of training sees the weights themselves. DeepSpeed and FSDP, which
    keep parameters in parts, are refused. The folders of a hyperparameter search get no `averages.pt`.

    Args:
        rules: a rule, whose average is called "average", or a mapping name -> rule.
        used: the name of the average that is used, of several.
        resume_from_checkpoint: the folder of the checkpoint that training is resumed from; needed only if it was moved
            and is not in the output folder.
        **options: of WeightAverages, such as exclude, dtype, device, rounding or overlap.

    Raises:
        ValueError: several rules without `used`, or no rule of that name.
        TypeError: a rule that is none.

    Example:
        >>> averaging = WeightAveragingCallback(EMA(0.999))
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[averaging])  # doctest: +SKIP

    References:
        transformers 5.23, trainer.py, for the order of events.
    """

    def __init__(
        self,
        rules: Rule | Mapping[str, Rule],
        *,
        used: str | None = None,
        resume_from_checkpoint: str | None = None,
        **options: Any,
    ) -> None:
        self._rules = {ONLY: rules} if isinstance(rules, Rule) else dict(rules)
        check_rules(self._rules)
        if used is None and len(self._rules) > 1:
            raise ValueError(f"used must name the average to use, one of {', '.join(map(repr, self._rules))}")
        self._used = next(iter(self._rules)) if used is None else used
        if self._used not in self._rules:
            raise ValueError(f"used is {used!r}, but the rules are for {', '.join(map(repr, self._rules))}")
        self._resume_from = resume_from_checkpoint
        self._options = options
        self._model: nn.Module
        self._lent: ExitStack | None = None
        self.averages: WeightAverages | None = None
        """The averages; None before training."""

    # The Trainer's attributes are typed as options that may be missing; they are there during training.
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:  # type: ignore[override]
        """Make the averages, or go on with those of the checkpoint.

        Raises:
            RuntimeError: a Trainer that keeps parameters in parts.
            ValueError: the averages of the checkpoint can't be found, or are others; nothing was loaded.
        """
        self._take_back()
        sharding = next((name for name in ("deepspeed", "fsdp") if getattr(args, name, None)), None)
        if sharding:
            raise RuntimeError(f"WeightAveragingCallback can't average under {sharding}: it keeps parameters in parts")
        averages = WeightAverages(model, self._rules, **self._options)
        self._model = model
        mark = state.stateful_callbacks.get(MARK)
        if state.global_step and mark:
            saved, own = self._find(mark, args, state.global_step), self._weights(averages)
            difference = different_tensors("weights", own, saved["weights"])
            if difference:
                raise ValueError(f"the checkpoint's model is another: {difference}")
            averages.load_state_dict(saved["averages"])
            with torch.no_grad():
                torch._foreach_copy_(list(own.values()), [saved["weights"][name] for name in own])
        self.averages = averages
        state.stateful_callbacks[MARK] = {"run": uuid.uuid4().hex, "output_dir": str(Path(args.output_dir).absolute())}
        if args.eval_on_start:
            self._lend()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the model its weights back."""
        self._take_back()

    on_epoch_begin = on_step_begin

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """Take the model's weights into the averages, unless accelerate's optimizer skipped the step."""
        if not getattr(optimizer, "step_was_skipped", False):
            self._made().update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Lend the model the average, if it is going to be evaluated or saved."""
        if control.should_evaluate or control.should_save:
            self._lend()

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the model its weights back, and write them and the averages beside the checkpoint's model."""
        self._take_back()
        folder = _folder(args.output_dir, state.global_step)
        if args.should_save and not args.save_only_model and folder.is_dir():
            averages, run = self._made(), state.stateful_callbacks[MARK]["run"]
            saved = {"averages": averages.state_dict(), "weights": self._weights(averages)}
            torch.save({"run": run, "step": state.global_step, **saved}, folder / FILE)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:
        """Give the model its weights back when training is over, before the best model is loaded into it."""
        # What it logs at the end only.
        if "train_runtime" in (logs or {}):
            self._take_back()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the average in the model, unless the best one was loaded into it."""
        self._take_back()
        averages = self._made()
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not best and averages.n_averaged[self._used]:
            averages.copy_to(name=self._used)

    def _made(self) -> WeightAverages:
        if self.averages is None:
            raise RuntimeError("the averages are made when training begins; call Trainer.train() first")
        return self.averages

    def _lend(self) -> None:
        averages = self._made()
        if self._lent is None and averages.n_averaged[self._used]:
            self._lent = ExitStack()
            self._lent.enter_context(averages.swapped(self._used))

    def _take_back(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.close()

    def _weights(self, averages: WeightAverages) -> dict[str, Tensor]:
        """The model's own tensors that are followed, by name."""
        state = averages.state_dict()
        followed = {*state["copies"], *state["averages"][self._used][0]}
        model = self._model
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {canonical(name): tensor.detach() for name, tensor in named if canonical(name) in followed}

    def _find(self, mark: Mapping[str, str], args: Any, step: int) -> dict[str, Any]:
        """The saved averages that belong to the Trainer's state."""
        given = (self._resume_from, args.resume_from_checkpoint)
        folders = [Path(folder) for folder in given if isinstance(folder, str)]
        folders += [_folder(each, step) for each in (args.output_dir, mark["output_dir"])]
        for folder in folders:
            if (folder / FILE).is_file():
                saved: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
                if (saved["run"], saved["step"]) == (mark["run"], step):
                    return saved
        raise ValueError(
            f"there is no {FILE} of the checkpoint's averages in {', '.join(map(str, folders))}; name its folder: "
            "WeightAveragingCallback(..., resume_from_checkpoint=...)"
        )


def _folder(output: str, step: int) -> Path:
    return Path(output) / f"checkpoint-{step}"
