"""FastWeightAveraging against Lightning's callbacks: the same numbers in Lightning's own loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastswa import EMA, SWA, AveragedModel, accelerate_torch
from tests.lightning_runs import (
    BATCHES,
    PAIRS,
    STEPS,
    Callback,
    EMAWeightAveraging,
    FastWeightAveraging,
    Net,
    StochasticWeightAveraging,
    WeightAveraging,
    assert_close,
    fit,
    saved,
    several,
    without,
)

# What Lightning says about small data and missing loggers.
pytestmark = pytest.mark.filterwarnings("ignore")


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


class LateNet(Net):
    """Makes a layer when the trainer asks for it, after the callbacks' setup."""

    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def configure_model(self) -> None:
        if self.last is None:
            self.last = nn.Linear(6, 1).double()
            nn.init.constant_(self.last.weight, 0.1)
            nn.init.zeros_(self.last.bias)


def test_layers_that_the_trainer_makes_late_are_averaged() -> None:
    ours, theirs = LateNet(), LateNet()
    fit(ours, FastWeightAveraging(decay=0.7))
    fit(theirs, EMAWeightAveraging(decay=0.7))
    assert_close(without(ours.state_dict()), without(theirs.state_dict()))


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
