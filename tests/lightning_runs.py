"""Short runs of Lightning's trainer, and the callbacks that are compared in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from benchmarks.torchvision_operators import declare
from fastswa import EMA, SWA

# torchmetrics, which Lightning imports, imports torchvision.
declare()

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,  # noqa: F401
    WeightAveraging,
)

from fastswa.integrations.lightning import FastWeightAveraging  # noqa: E402

BATCHES = 4
EPOCHS = 3
STEPS = EPOCHS * BATCHES
RULES = {"fast": EMA(0.5), "slow": EMA(0.9), "equal": SWA(start=2, every=3)}


class Net(LightningModule):
    """A regression with BatchNorm, a tied weight and a buffer that no checkpoint holds; remembers what it validated."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 1)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.validated: list[Tensor] = []
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.scratch.add_(1)
        return (self(batch) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated.append(self(batch).detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(
    model: Net, *callbacks: Callback, epochs: int = EPOCHS, resume: Path | str | None = None, **options: Any
) -> Trainer:
    """Train on the same random batches always."""
    rows = torch.randn(8 * BATCHES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    data = DataLoader(rows.to(model.first.weight.dtype), batch_size=8)
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = {
        "logger": False,
        "enable_checkpointing": checkpoints,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **{"num_sanity_val_steps": 1, **quiet, **options})
    trainer.fit(model, data, data, ckpt_path=resume, weights_only=False)
    return trainer


def without(state: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """A state but for some names: integer buffers, which torch's average truncates, or what no checkpoint holds."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(("num_batches_tracked", *parts))}


def assert_close(ours: Any, theirs: Any, dtype: torch.dtype = torch.float64) -> None:
    """Equal within the roundings of STEPS updates: 4 of Lightning's and 2 of ours each, on values below 8."""
    tolerance = 6 * STEPS * 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


PAIRS: dict[str, tuple[Callable[[], Callback], Callable[[], Callback]]] = {
    "equal": (WeightAveraging, FastWeightAveraging),
    "equal, buffers copied": (lambda: WeightAveraging(use_buffers=False), lambda: FastWeightAveraging(None, False)),
    "ema": (lambda: EMAWeightAveraging(decay=0.7), lambda: FastWeightAveraging(decay=0.7)),
    "positions": (
        lambda: EMAWeightAveraging("cpu", True, 0.7, 2, 3, 1),
        lambda: FastWeightAveraging("cpu", True, 0.7, 2, 3, 1),
    ),
    "by epoch": (
        lambda: EMAWeightAveraging(decay=0.7, update_every_n_steps=0, update_starting_at_epoch=1),
        lambda: FastWeightAveraging(decay=0.7, update_every_n_steps=0, update_starting_at_epoch=1),
    ),
    "avg_fn": (
        lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.6)),
        lambda: FastWeightAveraging(avg_fn=get_ema_avg_fn(0.6)),
    ),
    "multi_avg_fn": (
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.6)),
        lambda: FastWeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.6)),
    ),
}  # fmt: skip


def several() -> FastWeightAveraging:
    return FastWeightAveraging(rules=RULES, used="slow")
