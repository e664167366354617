"""docs/backend.md: its code, run as it stands, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.code_blocks import ROOT, run_blocks
from tests.numerics import assert_close_in_ulps, lerp_ulps

DECAY = 0.75
STEPS = 12
# What a step errs by, the next shrinks by the decay: the sum is a quarter of the errors' count, twice for both sides.
BOUND = 2 * lerp_ulps(torch.float32) / (1 - DECAY)


@pytest.fixture(scope="module")
def guide(torchvision_imports: None) -> dict[str, Any]:
    return run_blocks(ROOT / "docs" / "backend.md")


def steps(model: nn.Module, weights: list[Tensor]) -> Iterator[int]:
    """Change a model's weights a few times."""
    for step in range(STEPS):
        with torch.no_grad():
            for weight in weights:
                weight += torch.randn_like(weight)
        yield step


def test_averaged_model(guide: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = guide["averaged"](model, DECAY)
    exact, largest = start(model)
    for step in steps(model, list(model.parameters())):
        average.update_parameters(model)
        follow(model, exact, largest, 1 - DECAY if step else 1.0)
    compare(list(average.module.parameters()), exact, largest)


@pytest.mark.parametrize("interpreted", [True, False])
def test_a_class_of_your_own(guide: dict[str, Any], interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted:
        # As on a machine without a GPU, where the reference takes over.
        monkeypatch.delenv("TRITON_INTERPRET")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    averages = guide["Averages"](model, DECAY)
    exact, largest = start(model)
    for step in steps(model, list(model.parameters())):
        if step == 5:
            model[0].weight.data = model[0].weight.data.clone()
        averages.update()
        used = type(getattr(averages.move, "__self__", None)).__name__
        assert used == ("LerpTable" if interpreted else "NoneType")
        follow(model, exact, largest, 1 - DECAY)
    compare(averages.averages, exact, largest)


def fit(directory: Path, callback: Any, checkpoint: Path | None = None) -> Any:
    """Train a small model for six optimizer steps of two batches; it averages itself in float64 at each."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Tracked(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.average: tuple[list[Tensor], list[Tensor]] | None = None
            self.steps = 0

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            self.average = self.average or start(self)
            follow(self, *self.average, 1 - DECAY if self.steps else 1.0)
            self.steps += 1

    torch.manual_seed(0)
    module = Tracked()
    checkpoints = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        callbacks=[callback, checkpoints],
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # All batches alike: a resumed epoch begins with its first batch again.
    data = TensorDataset(torch.randn(4, 4).repeat(12, 1), torch.randn(4, 2).repeat(12, 1))
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=checkpoint)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_callback(guide: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", guide["Averaging"](DECAY))
    assert whole.steps == 6
    assert whole.average is not None
    compare(list(whole.parameters()), *whole.average)
    (saved,) = (tmp_path / "whole").glob("step=3*.ckpt")
    resumed = fit(tmp_path / "resumed", guide["Averaging"](DECAY), saved)
    assert resumed.steps == 3
    for tensor, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(tensor, expected)


def start(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    weights = [parameter.detach().double() for parameter in model.parameters()]
    return weights, [weight.abs() for weight in weights]


def follow(model: nn.Module, exact: list[Tensor], largest: list[Tensor], weight: float) -> None:
    for average, size, parameter in zip(exact, largest, model.parameters(), strict=True):
        average += weight * (parameter.detach() - average)
        torch.maximum(size, parameter.detach().abs(), out=size)


def compare(averages: list[Tensor], exact: list[Tensor], largest: list[Tensor]) -> None:
    for average, tensor, size in zip(averages, exact, largest, strict=True):
        assert_close_in_ulps(average.detach(), tensor, BOUND, size)
