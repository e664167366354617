"""EMA against ema-pytorch's: the same numbers, states that cross over, the same training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import ema_pytorch
import pytest
import torch
from ema_pytorch.ema_module_kwargs import EMAModuleWrapper
from torch import Tensor, nn

from fastswa.integrations.ema_pytorch import EMA
from tests.averages_apart import Apart, Operations, walk

Original = ema_pytorch.EMA
CLASSES = [EMA, Original]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
# The original's decay is a float32 power of a float32 number near 1: three roundings of half of 2^-24 or less.
WEIGHT_ERROR = 2.0**-23

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every_step": {"update_after_step": 0, "update_every": 1},
    "warm_up": {
        "beta": 0.9,
        "inv_gamma": 2.0,
        "power": 0.75,
        "min_value": 0.4,
        "update_after_step": 3,
        "update_every": 1,
    },
    "every_third": {"beta": 0.8, "update_after_step": 4, "update_every": 3},
    "frozen": {"beta": 1.0, "update_after_step": 3, "update_every": 1},
    "foreach": {"use_foreach": True, "update_after_step": 2, "update_every": 2},
    "names": {
        "param_or_buffer_names_no_ema": {"0.weight", "1.running_mean"},
        "ignore_names": {"0.bias"},
        "ignore_startswith_names": {"1.running_v", "2.w"},
        "update_after_step": 2,
        "update_every": 1,
    },
    "back_by_copy": {"update_model_with_ema_every": 4, "update_after_step": 2, "update_every": 1},
    "back_by_part": {
        "update_model_with_ema_every": 4,
        "update_model_with_ema_beta": 0.3,
        "update_after_step": 2,
        "update_every": 3,
    },
    "back_but_for_names": {
        "update_model_with_ema_every": 3,
        "update_model_with_ema_beta": 0.3,
        "ignore_names": {"0.bias"},
        "param_or_buffer_names_no_ema": {"2.weight"},
        "update_after_step": 0,
        "update_every": 1,
    },
    "apart": {"include_online_model": False, "update_after_step": 1, "update_every": 1},
    "lazy": {"lazy_init_ema": True, "update_after_step": 1, "update_every": 1},
    "coerced": {"coerce_dtype": True, "allow_different_devices": True, "move_ema_to_online_device": True},
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)


def floats(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


def pair(dtype: torch.dtype, **options: Any) -> tuple[list[Any], list[nn.Module]]:
    models = [network(dtype), network(dtype)]
    return [each(model, **options) for each, model in zip(CLASSES, models, strict=True)], models


def walk_together(models: list[nn.Module], step: int) -> None:
    for model in models:
        torch.manual_seed(step)
        walk([*model.parameters(), *model.buffers()])


@DTYPES
@pytest.mark.parametrize("name", OPTIONS)
def test_each_step_equals_the_original(name: str, dtype: torch.dtype) -> None:
    (ours, theirs), models = pair(dtype, **OPTIONS[name])
    apart = Apart(floats(models[0]), dtype, WEIGHT_ERROR)
    for step in range(40):
        walk_together(models, step)
        ours.update()
        theirs.update()
        # A weight of 0: the bound only grows, because where models follow their averages both err.
        apart.step(floats(models[0]), 0.0)
        apart.check(floats(ours.ema_model), floats(theirs.ema_model))
        apart.check(floats(models[0]), floats(models[1]))
        assert (int(ours.step), bool(ours.initted)) == (int(theirs.step), bool(theirs.initted))
        assert ours.get_current_decay() == pytest.approx(theirs.get_current_decay(), abs=WEIGHT_ERROR)
        # Integers come from the model, never back.
        assert int(models[0][1].num_batches_tracked) == step + 1
    if name == "every_step":
        # Documented: the original leaves them as they were.
        assert int(ours.ema_model[1].num_batches_tracked) == int(models[0][1].num_batches_tracked) == 40
        assert int(theirs.ema_model[1].num_batches_tracked) == 0


@DTYPES
@pytest.mark.parametrize("included", [True, False], ids=["with_model", "alone"])
@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_state_crosses_over_in_mid_run(first: int, included: bool, dtype: torch.dtype) -> None:
    options = {"beta": 0.9, "update_after_step": 2, "update_every": 1, "include_online_model": included}
    model = network(dtype)
    saving, stays = CLASSES[first](model, **options), CLASSES[first](copy.deepcopy(model), **options)
    for step in range(6):
        walk_together([model, stays.model], step)
        saving.update()
        stays.update()
    file = io.BytesIO()
    torch.save(saving.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = CLASSES[1 - first](network(dtype), **options)
    assert list(state) == list(resumed.state_dict())
    # What the host knows of the counters is out of date then.
    resumed.update()
    resumed.load_state_dict(state)
    assert (int(resumed.step), bool(resumed.initted)) == (6, True)
    assert all(map(torch.equal, floats(resumed.ema_model), floats(saving.ema_model)))
    resumed.model.load_state_dict(model.state_dict())
    apart = Apart(floats(model), dtype, WEIGHT_ERROR)
    for step in range(6, 12):
        walk_together([resumed.model, stays.model], step)
        resumed.update()
        stays.update()
        apart.step(floats(stays.model), 0.0)
        apart.check(floats(resumed.ema_model), floats(stays.ema_model))


def train(make: Callable[[nn.Module], Any]) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    ema = make(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hook = ema.add_to_optimizer_post_step_hook(optimizer)
    x = torch.randn(64, 6)
    y = x.sum(1, keepdim=True)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    hook.remove()
    ema.eval()
    return ema, ema(x)


def test_the_training_of_its_readme() -> None:
    options = {"beta": 0.9, "update_after_step": 5, "update_every": 2}
    (ours, our_output), (theirs, their_output) = (
        train(lambda model, each=each: each(model, **options)) for each in CLASSES
    )
    assert all(map(torch.equal, ours.model.parameters(), theirs.model.parameters()))
    # 20 updates of at most 4 ulp, and a weight error each, of tensors below 2; the output sums 16 such products.
    assert (our_output - their_output).abs().max() <= 16 * 20 * (4 + 2) * 2**-23
    assert not torch.equal(ours.ema_model[0].weight, ours.model[0].weight)
    assert not ours.ema_model.training
    assert ours.model.training


def test_the_librarys_wrapper_takes_it() -> None:
    model = network()
    wrapped = EMAModuleWrapper(model, EMA(model, update_after_step=0, update_every=1))
    walk(model.parameters())
    wrapped.update()
    x = torch.randn(4, 7)
    assert torch.equal(wrapped.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alone(make: Callable[[EMA], EMA]) -> None:
    ema = EMA(network(), beta=0.5, update_after_step=0, update_every=1)
    for step in range(3):
        walk_together([ema.model], step)
        ema.update()
    before = [tensor.clone() for tensor in floats(ema.ema_model)]
    other = make(ema)
    for each in (other, ema):
        walk_together([each.model], 9)
        each.update()
        assert not torch.equal(before[0], floats(each.ema_model)[0])
        if each is other:
            assert all(map(torch.equal, before, floats(ema.ema_model)))
    assert all(map(torch.equal, floats(ema.ema_model), floats(other.ema_model)))


def test_tied_weights_move_once_and_names_may_change() -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[1].weight = model[0].weight
    ours, theirs = (
        each(model, beta=0.9, min_value=0.9, update_after_step=0, update_every=1)
        for each, model in zip(CLASSES, models, strict=True)
    )
    apart = Apart(models[0].parameters(), torch.float32, WEIGHT_ERROR)
    for step in range(4):
        if step == 2:
            ours.ignore_names = theirs.ignore_names = {"0.weight"}
        walk_together(models, step)
        ours.update()
        theirs.update()
        apart.step(models[0].parameters(), 0.0)
        apart.check(ours.ema_model.parameters(), theirs.ema_model.parameters())


def test_another_dtype_and_a_module_of_ones_own() -> None:
    model = network().bfloat16()
    ema = EMA(
        model, ema_model=lambda: network(torch.float64), beta=0.5, min_value=0.5, update_every=1, update_after_step=0
    )
    ema.update()
    exact = [tensor.detach().double() for tensor in floats(model)]
    for step in range(3):
        walk_together([model], step)
        ema.update()
        exact = [0.5 * (one + other.detach().double()) for one, other in zip(exact, floats(model), strict=True)]
    for one, other in zip(floats(ema.ema_model), exact, strict=True):
        # Halves of sums of float64 numbers: 3 roundings.
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=3 * 2**-52 * 4)


def test_moved_and_replaced_tensors_are_followed() -> None:
    (ours, theirs), models = pair(torch.float32, beta=0.5, update_after_step=0, update_every=1)
    apart = Apart(floats(models[0]), torch.float32, WEIGHT_ERROR)
    for step in range(5):
        walk_together(models, step)
        for ema in (ours, theirs):
            if step == 2:
                ema.model[0].weight = nn.Parameter(ema.model[0].weight.detach().clone())
            if step == 3:
                ema.ema_model.load_state_dict(copy.deepcopy(ema.ema_model.state_dict()), assign=True)
            if step == 4:
                ema.step.fill_(7)
            ema.update()
        apart.step(floats(models[0]), 0.0)
        apart.check(floats(ours.ema_model), floats(theirs.ema_model))
    assert int(ours.step) == int(theirs.step) == 8
    # Another tensor, written as often as the one before.
    writes, ours.step = ours.step._version, torch.tensor(2)
    for _ in range(writes):
        ours.step.add_(0)
    ours.update()
    assert int(ours.step) == 3


def test_forward_eval_evaluates_and_forwarded_methods() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5)).eval()
    ema = EMA(model, forward_method_names=("extra_repr",))
    ema.train()
    ema.ema_model[1].eval()
    x = torch.randn(4, 7)
    assert torch.equal(ema.forward_eval(x), ema.ema_model[0](x))
    assert [part.training for part in ema.ema_model.modules()] == [True, True, False]
    assert ema.extra_repr.__self__ is ema.ema_model


def test_refusals() -> None:
    with pytest.raises(TypeError, match="the model is a list"):
        EMA([torch.zeros(2)])
    with pytest.raises(ValueError, match="not both"):
        EMA(network(), ema_model=network(), lazy_init_ema=True)
    with pytest.raises(ValueError, match="inv_gamma must be above 0"):
        EMA(network(), inv_gamma=0.0)
    model = network()
    model.lock = (each for each in ())
    with pytest.raises(RuntimeError, match=r"deep-copied.*generator"):
        EMA(model)
    model = network()
    ema = EMA(model, ema_model=model)
    with pytest.raises(ValueError, match="is the model's own"):
        ema.update_moving_average(model, model, 0.5)


def test_a_model_that_changed_is_refused_and_nothing_is_lost() -> None:
    ema = EMA(network(), update_after_step=0, update_every=1)
    ema.update()
    before = [tensor.clone() for tensor in floats(ema.ema_model)]
    ema.model[2] = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(3, 5\) in the average but \(1, 5\)"):
        ema.update()
    ema.model[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"the model has no '2\.weight'"):
        ema.update()
    assert int(ema.step) == 1
    assert all(map(torch.equal, before, floats(ema.ema_model)))


def test_no_update_reads_the_device() -> None:
    counts = {}
    for each in CLASSES:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
        ema = each(model, update_after_step=0, update_every=2)
        for _ in range(3):
            ema.update()
        with Operations() as operations:
            ema.update()
            ema.update()
        counts[each] = operations.names.count("_local_scalar_dense"), len(operations.names)
    assert counts[EMA][0] == 0
    # One call for 60 tensors (gathered, then moved), and the counter of each update.
    assert counts[EMA][1] <= 6
    # 4 where it averages and 2 where it does not.
    assert counts[Original][0] == 6
