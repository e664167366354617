"""The averages that ride along in a run, and how each is made ready to predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastswa
from benchmarks.training.options import Options

Batches = Iterable[tuple[Tensor, Tensor]]


class Averages:
    """SWA's average of the models that were collected, SWAG's Gaussian over them, and an EMA of all iterations.

    Args:
        model: that is trained, on its device.
        options: of the run, which say what is averaged.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.collected = 0
        """Models that SWA took."""
        self.swa = fastswa.AveragedModel(model) if options.swa else None
        dtype = torch.float64 if options.double else torch.float32
        self.swag = fastswa.SWAG(model, rank=options.swag_rank, dtype=dtype) if options.swag else None
        self.ema = None
        if options.ema_decay is not None:
            rule = fastswa.get_ema_multi_avg_fn(options.ema_decay)
            self.ema = fastswa.AveragedModel(model, multi_avg_fn=rule)

    def after_step(self) -> None:
        """Take the model into the exponential average; after each step of the optimizer."""
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def collect(self) -> None:
        """Take the model into SWA's average, and into SWAG's moments."""
        self.collected += 1
        if self.swa is not None:
            self.swa.update_parameters(self.model)
        if self.swag is not None:
            self.swag.collect()

    def recomputed(self, batches: Batches) -> Iterator[tuple[str, nn.Module]]:
        """The averages that hold a model, by name, each after its BatchNorm statistics were recomputed.

        Args:
            batches: of the training set.
        """
        found = {"swa": self.swa if self.collected else None, "ema": self.ema}
        for name, average in found.items():
            if average is not None:
                # By samples, as in the paper's code: the last batch may be short.
                fastswa.update_bn(batches, average, estimator="weighted")
                yield name, average

    def ensemble(self, batches: Batches, tests: Batches, samples: int) -> Tensor | None:
        """The mean prediction of SWAG's samples, each with BatchNorm statistics of its own.

        Args:
            batches: of the training set.
            tests: of the test set.
            samples: networks of the ensemble.

        Returns:
            Probabilities, float64, (N, classes); None without SWAG, or where it has no two models to sample from.
        """
        if self.swag is None or self.swag.refusal() is not None:
            return None
        return fastswa.average_predictions(self.swag, tests, samples, bn_loader=batches)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        parts = {name: part.state_dict() for name, part in self._parts()}
        return {"collected": self.collected, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was saved.

        Args:
            state: as `state_dict` gave it, of a run with equal options.
        """
        self.collected = state["collected"]
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for name in ("swa", "swag", "ema"):
            part = getattr(self, name)
            if part is not None:
                yield name, part
