"""What determines a training run's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from benchmarks.networks import TRAINED
from benchmarks.training.datasets import NAMES
from benchmarks.training.settings import settings

SCHEDULES = ("constant", "cyclical")


CYCLICAL = "swa_schedule='cyclical'"

NEEDS = {
    **dict.fromkeys(("swa_start", "swa_lr", "swa_schedule", "swag"), "swa"),
    **dict.fromkeys(("swa_lr_min", "cycle"), CYCLICAL),
    **dict.fromkeys(("swag_rank", "swag_samples"), "swag"),
}
"""Options that mean nothing without another."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A run. On a CPU two runs with equal options, dataset and number of threads are equal bit for bit.

    Args:
        dataset: one of `datasets.NAMES`.
        model: a key of `networks.TRAINED`.
        epochs: of the whole run.
        batch_size: images of a batch.
        lr_init: the first learning rate.
        momentum: of SGD.
        weight_decay: of all parameters.
        swa: average models of the run's end.
        swa_start: the first epoch whose models are averaged, counted from 1.
        swa_lr: the learning rate from 0.9 `swa_start` on; the highest of a cycle.
        swa_schedule: "constant": a model is taken after each epoch; "cyclical": at each cycle's lowest rate.
        swa_lr_min: the lowest rate of a cycle.
        cycle: its length in iterations; 0 for an epoch's.
        ema_decay: of an exponential average over all iterations; None for no such average.
        swag: collect the models that SWA takes in a `fastswa.SWAG` too, and test its ensemble after the last epoch.
        swag_rank: deviations that it keeps.
        swag_samples: networks of the ensemble.
        eval_every: epochs between tests; the first and the last are always tested.
        seed: of the weights, batches and dropout.
        amp: bfloat16 where torch.autocast finds it safe.
        double: float64 instead of float32 everywhere. Training magnifies what an operation rounds: in float32 another
            processor's rounding has moved a digits run by a point; in float64 it is too small to be seen at the end.
        channels_last: the memory format of weights and images.

    Raises:
        ValueError: an option that can't be; named.
    """

    dataset: str
    model: str
    epochs: int
    batch_size: int
    lr_init: float
    momentum: float = 0.9
    weight_decay: float
    swa: bool = False
    swa_start: int
    swa_lr: float
    swa_schedule: str = "constant"
    swa_lr_min: float
    cycle: int = 0
    ema_decay: float | None = None
    swag: bool = False
    swag_rank: int = 20
    swag_samples: int = 30
    eval_every: int
    seed: int = 0
    amp: bool = False
    double: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        _choice("model", self.model, tuple(TRAINED))
        _choice("swa_schedule", self.swa_schedule, SCHEDULES)
        for name, least, most in (
            *(("epochs", 1, inf), ("batch_size", 1, inf), ("lr_init", 0, inf), ("momentum", 0, 1)),
            *(("weight_decay", 0, inf), ("swa_lr", 0, inf), ("swa_lr_min", 0, self.swa_lr), ("cycle", 0, inf)),
            *(("ema_decay", 0, 1), ("swag_rank", 2, inf), ("swag_samples", 1, inf)),
            *(("eval_every", 1, inf), ("seed", 0, inf)),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, got {value}")
        if self.amp and self.double:
            raise ValueError("amp and double exclude each other: torch.autocast leaves float64 as it is")
        if self.swa and not 1 <= self.swa_start <= self.epochs:
            raise ValueError(f"swa_start must be one of the {self.epochs} epochs, got {self.swa_start}")

    @classmethod
    def of(cls, dataset: str, model: str | None = None, **given: Any) -> Options:
        """Options with the defaults that suit the dataset and the network.

        Args:
            dataset: one of `datasets.NAMES`.
            model: a key of `networks.TRAINED`; "digits" for digits and "preresnet164" for CIFAR if left out.
            **given: other options than the defaults.

        Raises:
            ValueError: an option that can't be, or one that means nothing without another; named.

        Example:
            >>> options = Options.of("cifar100", "vgg16", swa=True)
            >>> options.epochs, options.swa_start, options.swa_lr
            (300, 161, 0.01)
        """
        _choice("dataset", dataset, NAMES)
        model = model or ("digits" if dataset == "digits" else "preresnet164")
        _choice("model", model, tuple(TRAINED))
        suits = settings(model, dataset)
        shared = {field.name: getattr(suits, field.name) for field in fields(suits) if field.name != "swa_epochs"}
        if given.get("swa"):
            shared["epochs"] = suits.swa_epochs
        # From 0.05 to 0.01, as in Fast Geometric Ensembling's public commands; the SWA script has no cycles.
        shared["swa_lr_min"] = given.get("swa_lr", suits.swa_lr) / 5
        options = cls(dataset=dataset, model=model, **{**shared, **given})
        present = {"swa": options.swa, "swag": options.swag, CYCLICAL: options.swa_schedule == "cyclical"}
        for name in given:
            if name in NEEDS and not present[NEEDS[name]]:
                raise ValueError(f"{name} means nothing without {NEEDS[name]}")
        return options


def disagreement(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first option that a checkpoint has otherwise, in words.

    Args:
        saved: of the checkpoint.
        wanted: all options, or only those that were given.

    Example:
        >>> disagreement({"epochs": 60, "seed": 0}, {"seed": 1})
        'seed is 0 in the checkpoint and 1 here'
    """
    for name, value in wanted.items():
        if name not in saved or saved[name] != value:
            return f"{name} is {saved.get(name, 'missing')} in the checkpoint and {value} here"
    return None


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
