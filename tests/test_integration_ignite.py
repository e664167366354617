"""ignite's EMAHandler and ours in ignite's own engine: the same numbers, and checkpoints that cross over."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.handlers import EMAHandler as Original
from torch import nn

import fastswa
from fastswa.integrations.ignite import EMAHandler
from tests.models import ConvNet, TiedNet, assert_same_average, train_step

STEPS = 12


def engine_of(*models: nn.Module) -> Engine:
    """Trains the models alike."""

    def step(engine: Engine, batch: int) -> None:
        for model in models:
            torch.manual_seed(batch)
            train_step(model)

    return Engine(step)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.3},
    "warm-up downwards": {"momentum": 0.1, "momentum_warmup": 0.9, "warmup_iters": 5},
    "warm-up upwards": {"momentum": 0.9, "momentum_warmup": 0.1, "warmup_iters": 5},
    "buffers averaged": {"momentum": 0.3, "handle_buffers": "update"},
    "buffers left alone": {"momentum": 0.3, "handle_buffers": "ema_train"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("every", [1, 2])
def test_the_same_numbers_as_ignites(name: str, dtype: torch.dtype, every: int) -> None:
    model = ConvNet().to(dtype)
    trainer = engine_of(model)
    ours, theirs = EMAHandler(model, **OPTIONS[name]), Original(model, **OPTIONS[name])
    for handler in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=every))
    trainer.run(range(STEPS))
    assert_same_average(ours.ema_model, theirs.ema_model, STEPS)
    assert ours.ema_model.training == theirs.ema_model.training
    assert not any(parameter.requires_grad for parameter in ours.ema_model.parameters())
    assert ours.n_averaged == STEPS // every


def test_it_is_one_of_ignites() -> None:
    model = ConvNet()
    assert isinstance(EMAHandler(model), Original)
    for arguments in ({"momentum": 0.0}, {"handle_buffers": "keep"}):
        for each in (EMAHandler, Original):
            with pytest.raises(ValueError, match=r"momentum|handle_buffers"):
                each(model, **arguments)
    with pytest.raises(ValueError, match="instance of nn"):
        EMAHandler([model])


def test_a_momentum_in_the_engines_state_decides() -> None:
    model = ConvNet()
    trainer = engine_of(model)
    ours, theirs = EMAHandler(model), Original(model)
    for handler, name in ((ours, "ours"), (theirs, "theirs")):
        handler.attach(trainer, name)

    @trainer.on(Events.ITERATION_STARTED)
    def change(engine: Engine) -> None:
        engine.state.ours = engine.state.theirs = 1 / (engine.state.iteration + 1)

    trainer.run(range(STEPS))
    assert_same_average(ours.ema_model, theirs.ema_model, STEPS)


def test_the_warm_up_goes_to_the_name_that_was_given() -> None:
    model = ConvNet()
    arguments = {"momentum": 0.1, "momentum_warmup": 0.9, "warmup_iters": 5}
    named, theirs, plain = EMAHandler(model, **arguments), Original(model, **arguments), Original(model, **arguments)
    trainer = engine_of(model)
    seen: list[float] = []
    with warnings.catch_warnings():
        # Nothing is created twice: no warning for us.
        warnings.simplefilter("error")
        named.attach(trainer, "named")
        plain.attach(trainer)
    with pytest.warns(UserWarning, match="already exists in Engine.state"):
        EMAHandler(model).attach(trainer, "named")
    other = engine_of()
    with pytest.warns(UserWarning, match="'ema_momentum' is not defined"):
        theirs.attach(other, "their_name")
    other.run(range(1))
    assert (other.state.their_name, other.state.ema_momentum) == (0.1, 0.9)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.named))
    trainer.run(range(STEPS))
    assert seen == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, *[0.1] * 7])
    assert_same_average(named.ema_model, plain.ema_model, STEPS)


def test_copied_buffers_are_its_own() -> None:
    model = ConvNet()
    trainer = engine_of(model)
    ours, theirs = EMAHandler(model), Original(model)
    ours.attach(trainer, "ours")
    theirs.attach(trainer, "theirs")
    trainer.run(range(1))
    pointer = model.norm.running_mean.data_ptr()
    assert theirs.ema_model.norm.running_mean.data_ptr() == pointer != ours.ema_model.norm.running_mean.data_ptr()
    before = deepcopy(ours.ema_model.state_dict())
    train_step(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.ema_model.state_dict().items())


def test_tied_weights_stay_tied_and_move_once() -> None:
    model = TiedNet()
    trainer = engine_of(model)
    ours, theirs = EMAHandler(model, 0.3), Original(model, 0.3)
    ours.attach(trainer, "ours")
    theirs.attach(trainer, "theirs")
    trainer.run(range(STEPS))
    assert ours.ema_model.head.weight is ours.ema_model.embedding.weight
    assert_same_average(ours.ema_model, theirs.ema_model, STEPS)


@pytest.mark.parametrize("rule", [fastswa.SWA(), fastswa.EMA(0.9, warmup=fastswa.RatioWarmup())])
def test_a_rule_averages_as_it_does_elsewhere(rule: fastswa.rules.Rule) -> None:
    model = ConvNet()
    trainer = engine_of(model)
    handler = EMAHandler(model, rule=rule)
    handler.attach(trainer, "weight")
    # torch's own class, which calls the rule for lists of tensors.
    reference = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rule)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: reference.update_parameters(model))
    trainer.run(range(STEPS))
    assert_same_average(handler.ema_model, reference.module, STEPS)
    assert trainer.state.weight == rule.weight(STEPS - 1)


def test_what_a_rule_can_not_be() -> None:
    with pytest.raises(ValueError, match="takes no momentum_warmup"):
        EMAHandler(ConvNet(), rule=fastswa.SWA(), momentum_warmup=0.5, warmup_iters=3)
    with pytest.raises(TypeError, match="does not average exactly at every update"):
        EMAHandler(ConvNet(), rule=fastswa.SWA(every=2))


def test_a_model_that_changed_is_refused_before_anything_is_written() -> None:
    model = ConvNet()
    handler = EMAHandler(model, 0.5)
    trainer = engine_of()
    handler.attach(trainer)
    before = deepcopy(handler.ema_model.state_dict())
    train_step(model)
    model.head = nn.Linear(300, 4)
    with pytest.raises(ValueError, match="head"):
        trainer.run(range(1))
    assert handler.n_averaged == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in handler.ema_model.state_dict().items())


def parts(handler: Original, trainer: Engine) -> dict[str, Any]:
    saved = {"model": handler.model, "ema_model": handler.ema_model, "trainer": trainer}
    return saved | ({"handler": handler} if getattr(handler, "rule", None) else {})


def run(each: type[Original], model: nn.Module, folder: Path, resume: bool, stop: int, **arguments: Any) -> nn.Module:
    """Train to an epoch with ignite's checkpoints, perhaps from the one in the folder; gives the average."""
    trainer = engine_of(model)
    trainer.state_dict_user_keys.append("ema_momentum")
    handler = each(model, **arguments)
    trainer.state.ema_momentum = handler.momentum
    if resume:
        (file,) = folder.glob("*.pt")
        Checkpoint.load_objects(parts(handler, trainer), torch.load(file))
    handler.attach(trainer, warn_if_exists=False)
    saver = Checkpoint(parts(handler, trainer), DiskSaver(folder, require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(range(4), max_epochs=stop)
    return handler.ema_model


@pytest.mark.parametrize(
    ("first", "second", "arguments"),
    [
        (Original, EMAHandler, {"momentum": 0.2}),
        (EMAHandler, Original, {"momentum": 0.2}),
        (EMAHandler, EMAHandler, {"momentum": 0.2, "handle_buffers": "update"}),
        (EMAHandler, EMAHandler, {"rule": fastswa.SWA()}),
    ],
)
def test_checkpoints_cross_over(
    first: type[Original], second: type[Original], arguments: dict[str, Any], tmp_path: Path
) -> None:
    start = ConvNet()
    whole = run(second, deepcopy(start), tmp_path / "whole", False, 3, **arguments)
    run(first, deepcopy(start), tmp_path / "halves", False, 1, **arguments)
    halves = run(second, ConvNet(), tmp_path / "halves", True, 3, **arguments)
    assert_same_average(halves, whole, STEPS)


def test_a_real_training() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(engine: Engine, batch: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(step)
    ours, theirs = EMAHandler(model, 0.1), Original(model, 0.1)
    ours.attach(trainer, "ours")
    theirs.attach(trainer, "theirs")
    trainer.run([torch.randn(16, 6) for _ in range(10)], max_epochs=3)
    assert_same_average(ours.ema_model, theirs.ema_model, 30)
    x = torch.randn(64, 6)
    assert (ours.ema_model(x) - x.sum(1, keepdim=True)).square().mean() < x.sum(1).square().mean()
