"""The settings that suit each network and dataset: the SWA authors', and the digits' own."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """What suits a network.

    Args:
        epochs: the budget, in which SGD trains it.
        swa_epochs: of a run with SWA.
        lr_init: the first learning rate.
        weight_decay: of all parameters.
        swa_start: the first epoch after which SWA takes a model, counted from 1.
        swa_lr: the learning rate while models are averaged.
        batch_size: images of a batch.
        eval_every: epochs between tests; the average's BatchNorm pass takes a good part of an epoch.
    """

    epochs: int
    swa_epochs: int
    lr_init: float
    weight_decay: float
    swa_start: int
    swa_lr: float
    batch_size: int = 128
    eval_every: int = 5


_VGG = Settings(epochs=200, swa_epochs=300, lr_init=0.05, weight_decay=5e-4, swa_start=161, swa_lr=0.01)
_PRERESNET = Settings(epochs=150, swa_epochs=225, lr_init=0.1, weight_decay=3e-4, swa_start=126, swa_lr=0.05)
_WIDE = Settings(epochs=200, swa_epochs=300, lr_init=0.1, weight_decay=5e-4, swa_start=161, swa_lr=0.05)

SETTINGS = {
    # The demo's batches, rates and epochs; the last quarter is averaged, and SWA gets no more epochs than SGD.
    "digits": Settings(60, 60, 0.1, 5e-4, swa_start=46, swa_lr=0.05, batch_size=16, eval_every=1),
    "preresnet20": _PRERESNET,
    "preresnet110": _PRERESNET,
    "preresnet164": _PRERESNET,
    "vgg16": _VGG,
    "vgg16bn": _VGG,
    "wrn28x10": _WIDE,
}
"""The settings of the SWA authors' script, with 1.5 budgets for SWA; of preresnet20 and vgg16bn by analogy."""


def settings(model: str, dataset: str) -> Settings:
    """What suits a network on a dataset.

    Args:
        model: a key of `SETTINGS`.
        dataset: one of `datasets.NAMES`.
    """
    own = SETTINGS[model]
    if dataset == "digits":
        # Rates and decay are the network's, what counts images and epochs is the dataset's.
        return replace(SETTINGS["digits"], lr_init=own.lr_init, weight_decay=own.weight_decay, swa_lr=own.swa_lr)
    return replace(own, swa_lr=0.01) if dataset == "cifar10" and own is _PRERESNET else own
