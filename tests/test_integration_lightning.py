"""FastWeightAveraging against Lightning's callbacks: the same numbers and checkpoints in Lightning's own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from benchmarks.torchvision_operators import declare
from fastswa import EMA, SWA, AveragedModel, accelerate_torch

# torchmetrics, which Lightning imports, imports torchvision.
declare()

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from fastswa.integrations.lightning import FastWeightAveraging  # noqa: E402

BATCHES = 4
EPOCHS = 3
STEPS = EPOCHS * BATCHES

# Lightning's training epochs, and what it says about small data and missing loggers.
pytestmark = pytest.mark.filterwarnings("ignore")


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


def fit(model: Net, *callbacks: Callback, epochs: int = 3, resume: Path | str | None = None, **options: Any) -> Trainer:
    """Train on the same random batches always."""
    rows = torch.randn(8 * BATCHES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    data = DataLoader(rows.to(model.last.weight.dtype), batch_size=8)
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


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float64) for name in PAIRS), ("ema", torch.float32)])
def test_the_same_run_as_with_lightnings(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_theirs, make_ours = PAIRS[name]
    theirs, ours = Net(dtype), Net(dtype)
    there = fit(theirs, make_theirs())
    here = fit(ours, make_ours())
    # At the end the models hold the averages.
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), dtype)
    assert_close(without(dict(ours.named_buffers())), without(dict(theirs.named_buffers())), dtype)
    # Each epoch validated the average. Before the first update only Lightning does: see below.
    started = {"positions": 1 + BATCHES, "by epoch": 1 + 2 * BATCHES}.get(name, 0)
    assert len(ours.validated) == len(theirs.validated) == 1 + 3 * BATCHES
    for result, expected in zip(ours.validated[started:], theirs.validated[started:], strict=True):
        # Lipschitz: the weights' error grows by a factor below 100 through three layers and BatchNorm.
        torch.testing.assert_close(result, expected, rtol=0, atol=100 * 6 * STEPS * 8 * torch.finfo(dtype).eps)
    for trainer, file in ((here, "ours.ckpt"), (there, "theirs.ckpt")):
        trainer.save_checkpoint(tmp_path / file)
    one, other = saved(tmp_path / "ours.ckpt"), saved(tmp_path / "theirs.ckpt")
    assert one.keys() == other.keys()
    assert {**one["callbacks"]}.keys() == {**other["callbacks"]}.keys()
    for key in ("state_dict", "averaging_state"):
        assert_close(without(one[key]), without(other[key]), dtype)


def test_integer_buffers_are_copied_where_lightning_truncates() -> None:
    ours, theirs = Net(), Net()
    fit(ours, FastWeightAveraging(decay=0.7))
    fit(theirs, EMAWeightAveraging(decay=0.7))
    assert int(ours.norm.num_batches_tracked) == STEPS
    assert int(theirs.norm.num_batches_tracked) < STEPS
    assert_close(ours.last.weight, theirs.last.weight)


@pytest.mark.parametrize("start", [100, None])
def test_a_model_is_validated_and_kept_where_there_is_no_average_yet(start: int | None) -> None:
    plain, ours = Net(), Net()
    fit(plain)
    # Beyond the last step, or in epochs alone.
    fit(ours, FastWeightAveraging(update_every_n_steps=1 if start else 0, update_starting_at_step=start))
    assert len(ours.validated) == 1 + 3 * BATCHES
    torch.testing.assert_close(ours.validated, plain.validated, rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def stop_after_one_epoch(make: Callable[[], Callback], folder: Path) -> Path:
    """A checkpoint in mid-run, written by Lightning's own checkpoint callback."""
    fit(Net(), make(), ModelCheckpoint(folder, "first", save_top_k=-1), epochs=1)
    return folder / "first.ckpt"


@pytest.mark.parametrize("name", ["equal", "ema", "positions"])
@pytest.mark.parametrize("to_ours", [True, False])
def test_either_resumes_what_the_other_wrote(name: str, to_ours: bool, tmp_path: Path) -> None:
    written, resumed = PAIRS[name] if to_ours else PAIRS[name][::-1]
    whole, halves = Net(), Net()
    with torch.no_grad():
        halves.last.weight.fill_(99)
    callback = resumed()
    fit(whole, resumed())
    fit(halves, callback, resume=stop_after_one_epoch(written, tmp_path))
    assert callback._latest_update_step >= STEPS - 1
    assert_close(dict(halves.named_parameters()), dict(whole.named_parameters()))
    # A buffer that is not persistent counts the second part alone.
    halves_buffers, whole_buffers = dict(halves.named_buffers()), dict(whole.named_buffers())
    assert_close(without(halves_buffers, "scratch"), without(whole_buffers, "scratch"))


def test_the_model_itself_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    path = stop_after_one_epoch(lambda: FastWeightAveraging(decay=0.9), tmp_path)
    plain, checkpoint = Net(), saved(path)
    fit(plain, epochs=1)
    torch.testing.assert_close(checkpoint["current_model_state"], dict(plain.state_dict()), rtol=0, atol=0)
    assert not torch.equal(checkpoint["state_dict"]["last.weight"], plain.last.weight)
    assert checkpoint["averaging_state"] == {"n_averaged": torch.tensor(BATCHES)}


class Halt(Callback):
    """Fails in the middle of a validation."""

    def on_validation_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_validation_leaves_the_model_its_own_weights() -> None:
    plain, ours = Net(), Net()
    fit(plain, epochs=1)
    callback = FastWeightAveraging(decay=0.9)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(ours, callback, Halt(), epochs=1, num_sanity_val_steps=0)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(plain.named_parameters()), rtol=0, atol=0)
    assert callback.averages is not None
    callback.averages.update()


RULES = {"fast": EMA(0.5), "slow": EMA(0.9), "equal": SWA(start=2, every=3)}


def several() -> FastWeightAveraging:
    return FastWeightAveraging(rules=RULES, used="slow")


def test_several_averages_at_once() -> None:
    model, one = Net(), Net()
    callback = several()
    fit(model, callback)
    fit(one, FastWeightAveraging(decay=0.9))
    # The one that is used is what it would be alone.
    torch.testing.assert_close(model.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert callback.averages is not None
    assert callback.averages.n_averaged == {"fast": STEPS, "slow": STEPS, "equal": 4}
    assert not torch.equal(callback.averages.weights("fast")["last.weight"], model.last.weight)


def test_several_averages_resume_exactly_and_are_one_to_lightning(tmp_path: Path) -> None:
    path = stop_after_one_epoch(several, tmp_path)
    whole, halves, callback = several(), several(), EMAWeightAveraging(decay=0.9)
    fit(Net(), whole)
    fit(Net(), halves, resume=path)
    assert whole.averages is not None
    assert halves.averages is not None
    for name in RULES:
        ours, theirs = whole.averages.weights(name), halves.averages.weights(name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    model = Net()
    fit(model, callback, resume=path)
    assert_close(dict(model.named_parameters()), {
        name: whole.averages.weights("slow")[name] for name, _ in model.named_parameters()
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"the rule of '(slow|equal)' is .* in the file and missing here"):
        fit(Net(), FastWeightAveraging(rules={"fast": EMA(0.5)}), resume=path)
    (one := tmp_path / "one").mkdir()
    plain = stop_after_one_epoch(lambda: EMAWeightAveraging(decay=0.9), one)
    with pytest.raises(ValueError, match="holds one average"):
        fit(Net(), several(), resume=plain)


def test_a_checkpoint_without_averages_begins_them(tmp_path: Path) -> None:
    fit(Net(), ModelCheckpoint(tmp_path, "plain"), epochs=1)
    callback = FastWeightAveraging()
    fit(Net(), callback, resume=tmp_path / "plain.ckpt")
    assert callback.averages is not None
    assert callback.averages.n_averaged == {"average": STEPS - BATCHES}


def test_outside_of_fit_a_model_is_validated_as_it_is(tmp_path: Path) -> None:
    model, again = Net(), Net()
    trainer = fit(model, FastWeightAveraging(decay=0.9))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ones = torch.ones(8, 6, dtype=torch.float64)
    with torch.no_grad():
        model.last.weight.fill_(3)
    for callback in (*trainer.callbacks, FastWeightAveraging(decay=0.9)):
        trainer.callbacks = [callback]
        trainer.validate(model, DataLoader(ones, batch_size=8), verbose=False)
        assert torch.equal(model.validated[-1], model.eval()(ones))
    # A checkpoint gives the average.
    trainer.validate(again, DataLoader(ones, batch_size=8), tmp_path / "end.ckpt", verbose=False, weights_only=False)
    torch.testing.assert_close(dict(again.state_dict()), average, rtol=0, atol=0)


def test_a_float32_average_of_a_bfloat16_model() -> None:
    model = Net(torch.bfloat16)
    callback = FastWeightAveraging(decay=0.999, dtype=torch.float32)
    fit(model, callback)
    assert callback.averages is not None
    assert callback.averages.weights()["last.weight"].dtype == torch.float32


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="give one"):
        FastWeightAveraging(decay=0.9, rules=SWA())
    with pytest.raises(ValueError, match="one of 'a', 'b'; got None"):
        FastWeightAveraging(rules={"a": SWA(), "b": EMA(0.9)})
    with pytest.raises(TypeError, match="use Lightning's WeightAveraging"):
        FastWeightAveraging(avg_fn=lambda average, value, n: average)


@pytest.mark.parametrize("make", [WeightAveraging, EMAWeightAveraging])
def test_lightnings_own_callbacks_run_fused_under_acceleration(make: Callable[[], Callback]) -> None:
    fast, slow = Net(), Net()
    callback, plain = make(), make()
    fit(slow, plain)
    with accelerate_torch() as acceleration:
        fit(fast, callback)
    assert "lightning.pytorch.callbacks.weight_averaging.AveragedModel" in acceleration.patched
    assert callback._average_model.__class__ is AveragedModel
    assert callback._average_model._update is not None
    assert not isinstance(plain._average_model, AveragedModel)
    assert_close(without(fast.state_dict()), without(slow.state_dict()))


def test_lightnings_stochastic_weight_averaging_is_left_as_it_is() -> None:
    # Once an epoch it runs a loop of its own, in which none of torch's averages take part.
    models = Net(), Net()
    for model in models:
        with accelerate_torch() if model is models[0] else nullcontext():
            fit(model, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
