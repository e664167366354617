"""ModelEmaV3 against timm's: the same numbers, states that cross over, a training by timm's tasks and checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.averages_apart import Apart, Operations, walk
from tests.models import TiedNet
from tests.numerics import assert_close_in_ulps, lerp_ulps

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"decay": 0.8},
    "start": {"decay": 0.8, "update_after_step": 5},
    "warmup": {"decay": 0.9, "use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75},
    "bounds": {"decay": 0.8, "use_warmup": True, "min_decay": 0.5, "update_after_step": 4},
    "no_buffers": {"decay": 0.8, "exclude_buffers": True},
    "no_foreach": {"decay": 0.8, "foreach": False},
    "elsewhere": {"decay": 0.8, "device": "cpu"},
}


@pytest.fixture(scope="module")
def classes(torchvision_imports: None) -> list[Any]:
    """Ours and timm's."""
    from timm.utils import ModelEmaV3 as Original

    from fastswa.integrations.timm import ModelEmaV3

    return [ModelEmaV3, Original]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)


def floats(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def step_through(model: nn.Module, ours: Any, theirs: Any, apart: Apart, steps: range) -> None:
    """Take random steps into both averages and compare each; step 0 stands for none."""
    for step in steps:
        walk([*model.parameters(), *model.buffers()])
        for ema in (ours, theirs):
            ema.update(model, step=step or None)
        apart.step(floats(model), 1 - theirs.get_decay(step or None))
        apart.check(floats(ours.module), floats(theirs.module))
        assert int(ours.module[1].num_batches_tracked) == int(model[1].num_batches_tracked)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
def test_each_step_equals_the_original(classes: list[Any], options: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    ours, theirs = (each(model, **OPTIONS[options]) for each in classes)
    step_through(model, ours, theirs, Apart(floats(model), dtype), range(30))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, classes[1])
    for ema in (ours, theirs):
        ema.set(model)
    assert all(map(torch.equal, ours.state_dict().values(), model.state_dict().values()))


def test_float32_averages_of_a_bfloat16_model_equal_the_original(classes: list[Any]) -> None:
    model = network(torch.bfloat16)
    ours, theirs = (each(model, decay=0.9, dtype=torch.float32) for each in classes)
    step_through(model, ours, theirs, Apart(floats(model), torch.float32), range(1, 20))
    assert {tensor.dtype for tensor in floats(ours)} == {torch.float32}


def test_a_tied_weight_moves_once(classes: list[Any]) -> None:
    model = TiedNet()
    ours, theirs = (each(model, decay=0.9) for each in classes)
    start = model.head.weight.detach().clone()
    walk(model.parameters())
    for ema in (ours, theirs):
        ema.update(model)
    gap = model.head.weight.detach().double() - start.double()
    moved = start.double() + (1 - 0.9) * gap
    assert ours.module.head.weight is ours.module.embedding.weight
    assert_close_in_ulps(
        ours.module.head.weight.detach(), moved, lerp_ulps(torch.float32), start, model.head.weight.detach()
    )
    # timm's moves by 1 - 0.9^2 of the gap.
    wrong = (theirs.module.head.weight.detach().double() - start) / gap
    assert wrong.median() == pytest.approx(0.19, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_small_steps_add_up_in_half_precision(classes: list[Any], dtype: torch.dtype) -> None:
    model = nn.Linear(128, 256).to(dtype)
    nn.init.ones_(model.weight)
    ours, nearest = classes[0](model, decay=0.9999), classes[0](model, decay=0.9999, stochastic_rounding=False)
    nn.init.constant_(model.weight, 2.0)
    for step in range(2, 102):
        for ema in (ours, nearest):
            ema.update(model, step)
    assert bool((nearest.module.weight == 1).all())
    # The mean of 2^15 independent elements, each rounded 100 times between neighbours a grid apart. Rounding a step
    # of s has the variance s (grid - s) at most, the sum of 100 that of 100 s grids; five standard deviations.
    grid = torch.finfo(dtype).eps
    deviation = (100 * 1e-4 * grid) ** 0.5 / 2**7.5
    assert float(ours.module.weight.detach().double().mean()) == pytest.approx(2 - 0.9999**100, abs=5 * deviation)


def test_a_resumed_run_rounds_as_an_uninterrupted_one(classes: list[Any]) -> None:
    model = network(torch.bfloat16)
    whole, first = (classes[0](model, decay=0.99, stochastic_rounding_seed=7) for _ in range(2))
    other = classes[0](model, decay=0.99, stochastic_rounding_seed=8)
    for step in range(1, 11):
        walk(model.parameters())
        for ema in (whole, first, other):
            ema.update(model, step)
        if step == 5:
            second = classes[0](network(torch.bfloat16), decay=0.99, stochastic_rounding_seed=7)
            second.load_state_dict(first.state_dict())
            first = second
    assert all(map(torch.equal, whole.state_dict().values(), first.state_dict().values()))
    assert not torch.equal(whole.module[0].weight, other.module[0].weight)


def test_a_bfloat16_average_is_rounded_once_to_nearest(classes: list[Any]) -> None:
    model = nn.Linear(64, 64).bfloat16()
    ema = classes[0](model, decay=0.9, stochastic_rounding=False)
    before = ema.module.weight.detach().clone()
    walk(model.parameters())
    ema.update(model)
    after = model.weight.detach()
    exact = before.double() + (1 - 0.9) * (after.double() - before.double())
    assert_close_in_ulps(ema.module.weight.detach(), exact, lerp_ulps(torch.bfloat16), before, after)


def test_buffers_that_no_state_holds_follow_too(classes: list[Any]) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.zeros(3), persistent=False)
    ours, theirs = (each(model, decay=0.75) for each in classes)
    model.scale.fill_(1.0)
    for ema in (ours, theirs):
        ema.update(model)
    assert (ours.module.scale.tolist(), theirs.module.scale.tolist()) == ([0.25] * 3, [0.0] * 3)


@DTYPES
@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_state_crosses_over_in_mid_run(classes: list[Any], first: int, dtype: torch.dtype) -> None:
    model = network(dtype)
    options = OPTIONS["warmup"]
    saving, stays = (classes[first](model, **options) for _ in range(2))
    for step in range(1, 6):
        walk([*model.parameters(), *model.buffers()])
        saving.update(model, step)
        stays.update(model, step)
    resumed = classes[1 - first](network(dtype), **options)
    resumed.update(model, 1)
    resumed.load_state_dict(saving.state_dict())
    assert all(map(torch.equal, resumed.state_dict().values(), stays.state_dict().values()))
    step_through(model, resumed, stays, Apart(floats(model), dtype), range(6, 12))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(classes: list[Any], again: Any) -> None:
    model = network()
    ours, theirs = (each(model, decay=0.8) for each in classes)
    apart = Apart(floats(model), torch.float32)
    step_through(model, ours, theirs, apart, range(3))
    left = copy.deepcopy(ours.state_dict())
    step_through(model, again(ours), theirs, apart, range(3))
    assert all(map(torch.equal, left.values(), ours.state_dict().values()))


def test_moved_and_loaded_averages_and_wrapped_models_are_followed(classes: list[Any]) -> None:
    model = network()
    ours, theirs = (each(model, decay=0.8) for each in classes)
    apart = Apart(floats(model), torch.float32)
    step_through(model, ours, theirs, apart, range(2))
    ours.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()}, assign=True)
    step_through(model, ours, theirs, apart, range(2))
    model[0].weight.data = model[0].weight.data.clone()
    step_through(model, ours, theirs, apart, range(2))
    walk(model.parameters())
    ours.update(torch.compile(model))
    theirs.update(model)
    apart.step(floats(model), 1 - 0.8)
    apart.check(floats(ours.module), floats(theirs.module))
    ours.double().update(model)
    assert {tensor.dtype for tensor in floats(ours)} == {torch.float64}


def test_a_graph_through_the_average_notices_the_update(classes: list[Any]) -> None:
    model = nn.Linear(3, 3)
    for each in classes:
        ema = each(model)
        ema.update(model)
        loss = ema(torch.ones(1, 3, requires_grad=True)).sum()
        ema.update(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_model_that_does_not_match_loses_nothing(classes: list[Any]) -> None:
    ema = classes[0](network(), decay=0.5)
    before = copy.deepcopy(ema.state_dict())
    others = [nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), nn.Sequential(nn.Linear(7, 1), *network()[1:])]
    for other in others:
        for call in (ema.update, ema.set):
            with pytest.raises(ValueError, match=r"2\.weight|0\.weight"):
                call(other)
    assert all(map(torch.equal, before.values(), ema.state_dict().values()))


def test_a_scripted_model_goes_through_the_original(classes: list[Any]) -> None:
    model = torch.jit.script(network())
    ours, theirs = (each(model, decay=0.8) for each in classes)
    walk(model.parameters())
    for ema in (ours, theirs):
        ema.update(model)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_an_update_neither_loops_nor_reads_the_device(classes: list[Any]) -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(9) for _ in range(30)))
    counts = []
    for each in classes:
        ema = each(model, decay=0.9)
        ema.update(model)
        with Operations() as operations:
            ema.update(model)
        assert "_local_scalar_dense" not in operations.names
        counts.append(len(operations.names))
    assert counts[0] <= 4
    assert counts[1] >= 30


def train(each: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    """An epoch is eight steps of timm's classification task; the checkpoint of each is saved by timm."""
    from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
    from timm.task import task as module
    from timm.utils import CheckpointSaver

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    inputs, targets = torch.randn(16, 1, 6, 6), torch.arange(16) % 3
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ModelEmaV3", each)
        ema = task.setup_ema(decay=0.9, use_warmup=True)
    assert type(ema) is each
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9)
    start = 0
    if resume is not None:
        start = resume_task_checkpoint(task, resume, optimizer, log_info=False)
        load_task_ema_checkpoint(task, resume)
    folder.mkdir()
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(folder), recovery_dir=str(folder))
    for epoch in range(start, epochs):
        for index in range(8):
            optimizer.zero_grad()
            task(inputs, targets)["loss"].backward()
            optimizer.step()
            task.update_ema(step=8 * epoch + index + 1)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(task.get_eval_model(ema=True)(inputs), targets)
        saver.save_checkpoint(epoch, metric=float(-loss))
    return task


@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_training_by_timms_task_is_resumed_by_either(classes: list[Any], first: int, tmp_path: Path) -> None:
    whole = train(classes[1], tmp_path / "whole", 4)
    train(classes[first], tmp_path / "half", 2)
    resumed = train(classes[1 - first], tmp_path / "second", 4, tmp_path / "half" / "checkpoint-1.pth.tar")
    for name, tensor in whole.get_trainable_module().state_dict().items():
        # Training itself is the same, bit for bit.
        assert torch.equal(tensor, resumed.get_trainable_module().state_dict()[name]), name
    ours, theirs = resumed.get_trainable_module(ema=True), whole.get_trainable_module(ema=True)
    for name, tensor in theirs.state_dict().items():
        # 4 ulp a step at most, of values below 2.
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=32 * 4 * 2**-23)
