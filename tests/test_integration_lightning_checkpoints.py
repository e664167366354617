"""Checkpoints of FastWeightAveraging and of Lightning's callbacks: either resumes the other's, in mid-run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fastswa import EMA
from tests.lightning_runs import (
    BATCHES,
    PAIRS,
    RULES,
    STEPS,
    Callback,
    EMAWeightAveraging,
    FastWeightAveraging,
    ModelCheckpoint,
    Net,
    assert_close,
    fit,
    saved,
    several,
    without,
)

# What Lightning says about small data and missing loggers.
pytestmark = pytest.mark.filterwarnings("ignore")


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
