"""ExponentialMovingAverage against torch_ema's: the same numbers, states that cross over, the same training."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_ema import ExponentialMovingAverage as Original

from fastswa.integrations.torch_ema import ExponentialMovingAverage
from tests.averages_apart import Apart, Operations, walk

CLASSES = [ExponentialMovingAverage, Original]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)


def weight(ema: Any) -> float:
    n = ema.num_updates
    return 1 - (ema.decay if n is None else min(ema.decay, (1 + n) / (10 + n)))


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [*state["shadow_params"], *(state["collected_params"] or ())]


@DTYPES
@pytest.mark.parametrize("given", [False, True], ids=["remembered", "given"])
@pytest.mark.parametrize("counts", [False, True], ids=["fixed", "counted"])
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.9999, 1.0])
def test_each_step_equals_the_original(decay: float, counts: bool, given: bool, dtype: torch.dtype) -> None:
    model = network(dtype)
    parameters = list(model.parameters())
    ours, theirs = (each(parameters, decay, counts) for each in CLASSES)
    apart = Apart(parameters, dtype)
    for _ in range(40):
        walk(parameters)
        for ema in (ours, theirs):
            ema.update(iter(parameters) if given else None)
        apart.step(parameters, weight(ours))
        apart.check(ours.shadow_params, theirs.shadow_params)
        assert ours.num_updates == theirs.num_updates


def test_float32_averages_of_a_bfloat16_model_equal_the_original() -> None:
    parameters = list(network(torch.bfloat16).parameters())
    ours, theirs = (each(parameters, 0.9) for each in CLASSES)
    for ema in (ours, theirs):
        ema.update()
        ema.to(dtype=torch.float32)
    for one, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        # Documented: theirs rounded three times to bfloat16 by then.
        other.copy_(one)
    apart = Apart(parameters, torch.float32)
    for _ in range(20):
        walk(parameters)
        ours.update()
        theirs.update()
        apart.step(parameters, weight(ours))
        apart.check(ours.shadow_params, theirs.shadow_params)


def test_a_bfloat16_average_is_rounded_once_a_step() -> None:
    parameters = [torch.randn(4096).bfloat16()]
    errors = {}
    for each in CLASSES:
        ema = each(parameters, 0.9, use_num_updates=False)
        exact = ema.shadow_params[0].double()
        moved = [parameter + torch.randn(4096).bfloat16() for parameter in parameters]
        ema.update(moved)
        exact = exact + (1 - 0.9) * (moved[0].double() - exact)
        errors[each] = float(((ema.shadow_params[0].double() - exact) / exact.abs().clamp_min(1)).abs().max())
    # Half an ulp of bfloat16, whose numbers have 8 bits, and the float32 arithmetic's share of it.
    assert errors[ExponentialMovingAverage] <= 2**-8 * 0.51 * 2
    assert errors[Original] > errors[ExponentialMovingAverage]


@DTYPES
@pytest.mark.parametrize("stored", [False, True], ids=["bare", "stored"])
@pytest.mark.parametrize("first", [0, 1], ids=["ours_first", "theirs_first"])
def test_a_state_crosses_over_in_mid_run(first: int, stored: bool, dtype: torch.dtype) -> None:
    parameters = list(network(dtype).parameters())
    saving, stays = (each(parameters, 0.95) for each in (CLASSES[first], CLASSES[first]))
    for _ in range(5):
        walk(parameters)
        saving.update()
        stays.update()
    if stored:
        saving.store()
        stays.store()
    file = io.BytesIO()
    torch.save(saving.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == list(stays.state_dict())
    resumed = CLASSES[1 - first](parameters, 0.5, use_num_updates=False)
    resumed.update()
    resumed.load_state_dict(state)
    assert (resumed.decay, resumed.num_updates) == (0.95, 5)
    for one, other in zip(tensors(resumed.state_dict()), tensors(stays.state_dict()), strict=True):
        assert torch.equal(one, other)
    apart = Apart(parameters, dtype)
    for _ in range(5):
        walk(parameters)
        resumed.update()
        stays.update()
        apart.step(parameters, weight(resumed))
        apart.check(resumed.shadow_params, stays.shadow_params)


@pytest.mark.parametrize("each", CLASSES)
def test_a_copy_of_the_state_stays_and_the_state_itself_follows(each: type) -> None:
    parameters = list(network().parameters())
    ema = each(parameters, 0.9)
    ema.update()
    state, kept = ema.state_dict(), copy.deepcopy(ema.state_dict())
    walk(parameters)
    ema.update()
    assert torch.equal(state["shadow_params"][0], ema.shadow_params[0])
    assert not torch.equal(kept["shadow_params"][0], ema.shadow_params[0])


def train(each: type) -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ema = each(model.parameters(), decay=0.9)
    x = torch.randn(64, 6)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        ema.update()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with ema.average_parameters(), torch.no_grad():
            losses.append(float(nn.functional.mse_loss(model(x), y)))
        assert all(map(torch.equal, before, model.parameters()))
    ema.copy_to(model.parameters())
    return list(model.parameters()), losses


def test_the_training_of_its_readme() -> None:
    (ours, our_losses), (theirs, their_losses) = map(train, CLASSES)
    assert our_losses[-1] < our_losses[0] / 2
    # Training itself is the same, bit for bit; the averages differ by 4 ulp a step at most, of weights below 2.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=30 * 4 * 2**-23)
    # A mean of squares of errors below 4, whose derivative by a weight is at most 2 * 4 * the largest input, 5.
    torch.testing.assert_close(our_losses, their_losses, rtol=0, atol=1e-3)


def test_the_parameters_come_back_after_an_error() -> None:
    model = network()
    ema = ExponentialMovingAverage(model.parameters(), 0.9)
    walk(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    context = ema.average_parameters()
    context.__enter__()
    assert torch.equal(next(model.parameters()), ema.shadow_params[0])
    assert not context.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert all(map(torch.equal, before, model.parameters()))


def test_replaced_and_moved_tensors_are_followed() -> None:
    model = network()
    ema, original = (each(model.parameters(), 0.5, use_num_updates=False) for each in CLASSES)
    apart = Apart(model.parameters(), torch.float32)
    for step in range(5):
        walk(model.parameters())
        if step == 1:
            model[0].weight.data = model[0].weight.data.clone()
        if step == 2:
            ema.shadow_params[1] = ema.shadow_params[1] + 0
        if step == 3:
            ema.shadow_params[0].data = ema.shadow_params[0].data.clone()
        if step == 4:
            ema = copy.deepcopy(ema)
            # It holds addresses, and would be copied with all that it reads.
            assert ema._update is None
        ema.update()
        original.update()
        apart.step(model.parameters(), 0.5)
        apart.check(ema.shadow_params, original.shadow_params)


def test_the_model_is_not_kept_alive() -> None:
    model = network()
    ema = ExponentialMovingAverage(model.parameters(), 0.9)
    ema.update()
    ended = weakref.ref(model[0].weight), weakref.ref(model[0].weight.untyped_storage())
    del model
    gc.collect()
    assert [reference() for reference in ended] == [None, None]
    with pytest.raises(ValueError, match="no longer exist"):
        ema.update()
    other = list(network().parameters())
    ema.update(other)
    ema.load_state_dict(ema.state_dict())


def test_integers_are_copied_and_shared_memory_stays() -> None:
    parameters = [torch.zeros(3), torch.tensor(5), torch.zeros(2).share_memory_(), torch.zeros(0)]
    ema = ExponentialMovingAverage(parameters, 0.5, use_num_updates=False)
    for _ in range(3):
        walk(parameters)
        ema.update()
    assert int(ema.shadow_params[1]) == 8


def test_a_state_keeps_the_dtype_of_the_averages() -> None:
    parameters = list(network(torch.bfloat16).parameters())
    saved, ema = (ExponentialMovingAverage(parameters, 0.9) for _ in range(2))
    saved.to(dtype=torch.float32)
    ema.to(dtype=torch.float32)
    walk(parameters)
    saved.update()
    ema.load_state_dict(saved.state_dict())
    assert all(map(torch.equal, ema.shadow_params, saved.shadow_params))
    assert ema.shadow_params[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.5}, "decay must be in"),
        ({"num_updates": 1.5}, "num_updates must be an int or None"),
        ({"shadow_params": (torch.zeros(2),)}, "averages must be a list"),
        ({"shadow_params": [torch.zeros(2)]}, "1 averages for 6 tensors"),
        ({"collected_params": [torch.zeros(2)]}, "1 stored parameters for 6 tensors"),
        ({"decay": None}, "no 'decay' in the state"),
    ],
)
def test_a_bad_state_loses_nothing(change: dict[str, Any], message: str) -> None:
    ema = ExponentialMovingAverage(network().parameters(), 0.9)
    before = copy.deepcopy(ema.state_dict())
    others = {"shadow_params": list(map(torch.ones_like, before["shadow_params"])), "num_updates": 3}
    bad = {name: value for name, value in {**before, **others, **change}.items() if (name, value) != ("decay", None)}
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(bad)
    assert (ema.decay, ema.num_updates, ema.collected_params) == (0.9, 0, None)
    assert all(map(torch.equal, ema.shadow_params, before["shadow_params"]))


def test_refusals() -> None:
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be in"):
            ExponentialMovingAverage([torch.zeros(2)], decay)
    ema = ExponentialMovingAverage([torch.zeros(2, 3), torch.zeros(3)], 0.9)
    good = [torch.ones(2, 3), torch.ones(3)]
    for call in (ema.update, ema.copy_to, ema.store):
        for bad in ([good[0]], [good[0], torch.ones(1)]):
            with pytest.raises(ValueError, match=r"averages|shape"):
                call(bad)
    with pytest.raises(RuntimeError, match="nothing is stored"):
        ema.restore()
    with pytest.raises(TypeError, match="sparse"):
        ema.update([good[0].to_sparse(), good[1]])
    assert (ema.num_updates, ema.collected_params) == (0, None)
    assert not any(map(torch.any, ema.shadow_params))
    assert all(map(torch.all, good))


def test_an_update_neither_loops_nor_reads_the_device() -> None:
    parameters = [torch.randn(100) for _ in range(50)]
    counts = {}
    for each in CLASSES:
        ema = each(parameters, 0.9)
        ema.update()
        with Operations() as operations:
            ema.update()
        assert "_local_scalar_dense" not in operations.names
        counts[each] = len(operations.names)
    assert counts[ExponentialMovingAverage] <= 3
    assert counts[Original] >= 150
