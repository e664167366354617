"""SWAG saved, loaded and copied, and beside a model that changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastswa import SWAG
from tests.models import ConvNet, TiedNet, train_step
from tests.swag import contents, same, sample, save_and_load, trained, values


@pytest.mark.parametrize("saved_after", [0, 2, 4, 7, 11])
@pytest.mark.parametrize("options", [{}, {"start": 1, "every": 2}, {"rank": 0}, {"dtype": torch.float64}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved_after: int, options: dict[str, object]) -> None:
    model = ConvNet()
    whole = trained(model, saved_after, **options)
    resumed = SWAG(model, **{"rank": 4, **options})
    resumed.load_state_dict(save_and_load(whole))
    assert resumed.n_averaged == whole.n_averaged
    for _ in range(6):
        train_step(model)
        whole.collect()
        resumed.collect()
    assert same(whole.state_dict(), resumed.state_dict())
    if "rank" not in options:
        assert same(sample(whole, model), sample(resumed, model))


def test_before_the_first_model_zeros_are_saved() -> None:
    state = save_and_load(SWAG(ConvNet()))
    assert state["deviations"] == []
    assert not any(tensor.any() for key in ("mean", "variance") for tensor in state[key].values())


def test_a_file_holds_the_columns_in_use_and_no_others() -> None:
    sizes = []
    for rank in (3, 30):
        file = io.BytesIO()
        torch.save(trained(nn.Linear(100, 100), 3, rank=rank).state_dict(), file)
        sizes.append(file.tell())
    # Mean, variance and 3 deviations of 10 100 float32 numbers; names and zip entries in the rest.
    assert max(sizes) < 5 * 4 * 10_100 + 10_000
    assert max(sizes) - min(sizes) < 1000


WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "rank": (lambda state: state.update(rank=9), "rank is 9 in the file and 4 here"),
    "every": (lambda state: state.update(every=7), "every is 7 in the file and 1 here"),
    "start": (lambda state: state.update(start=7), "start is 7 in the file and 0 here"),
    "calls": (lambda state: state.update(calls="many"), "calls must be an int"),
    "count": (lambda state: state.update(n_averaged=-1), "n_averaged must be an int of at least 0"),
    "key": (lambda state: state.pop("variance"), "there is no 'variance' in the file"),
    "columns": (lambda state: state["deviations"].pop(), "of 5 models there should be 4 deviations in the file, not 3"),
    "missing": (lambda state: state["variance"].pop("hidden.bias"), "'hidden.bias' of the variance is only here"),
    "extra": (lambda state: state["mean"].update(x=torch.zeros(1)), "'x' of the mean is only in the file"),
    "dtype": (
        lambda state: state["mean"].update({"head.bias": torch.zeros(3, dtype=torch.float64)}),
        r"'head.bias' of the mean is torch.float64 \(3,\) in the file and torch.float32 \(3,\) here",
    ),
    "shape": (
        lambda state: state["deviations"][3].update({"head.bias": torch.zeros(5)}),
        r"'head.bias' of the deviation 3 is torch.float32 \(5,\) in the file and torch.float32 \(3,\) here",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_state_is_refused_and_nothing_changes(what: str) -> None:
    change, message = WRONG[what]
    model = ConvNet()
    swag = trained(model)
    other = save_and_load(trained(ConvNet()))
    change(other)
    before = contents(swag)
    with pytest.raises(ValueError, match=message):
        swag.load_state_dict(other)
    assert same(swag.state_dict(), before)
    train_step(model)
    swag.collect()


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model = ConvNet()
    swag = trained(model)
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other_model, other = duplicate((model, swag))
        before = contents(swag)
        assert same(other.state_dict(), before)
        for _ in range(3):
            train_step(other_model)
            other.collect()
        assert same(swag.state_dict(), before)
        assert other.n_averaged == 8
        newest = other.state_dict()["deviations"][7 % 4]["hidden.weight"]
        exact = other_model.hidden.weight - other.state_dict()["mean"]["hidden.weight"]
        # Roundings of numbers below 4.
        assert torch.allclose(newest, exact, rtol=0, atol=2e-6)


def test_the_model_may_change_its_dtype_and_memory() -> None:
    model = nn.Linear(4, 3)
    swag, models = SWAG(model, rank=3), []
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.float, lambda model: replace(model)):
        change(model)
        train_step(model)
        swag.collect()
        models.append(model.weight.detach().double().clone())
    # 4 updates of two float32 roundings of numbers below 4.
    assert torch.allclose(swag.state_dict()["mean"]["weight"].double(), torch.stack(models).mean(0), rtol=0, atol=4e-6)
    swag.mean_()
    assert torch.equal(model.weight, swag.state_dict()["mean"]["weight"])


def replace(model: nn.Linear) -> None:
    model.weight = nn.Parameter(model.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.append(nn.Linear(1, 1)), "'2.weight' has appeared in the model; make a new SWAG"),
        (lambda model: model.__delitem__(1), "'1.bias' is no longer in the model; make a new SWAG"),
        (lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(9))), r"'0.bias' had shape \(7,\) and now"),
    ],
)
def test_a_model_that_changed_is_refused(change: Callable[[nn.Module], object], message: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    swag = trained(model)
    before = contents(swag)
    change(model)
    weights = values(model)
    for refused in (swag.collect, swag.sample_, swag.mean_, swag.sampled().__enter__):
        with pytest.raises(ValueError, match=message):
            refused()
    assert same(swag.state_dict(), before)
    assert same(values(model), weights)


def test_another_model_is_written_only_if_it_fits() -> None:
    swag = trained(TiedNet())
    wrong = TiedNet()
    wrong.layer.bias = nn.Parameter(torch.zeros(7))
    before = values(wrong)
    for refused in (swag.sample_, swag.mean_):
        with pytest.raises(ValueError, match=r"has shape \(7,\) for 'layer.bias'"):
            refused(wrong)
        assert same(values(wrong), before)
    compiled = torch.compile(TiedNet(), backend="eager")
    swag.mean_(compiled)
    assert torch.equal(compiled.layer.bias, swag.state_dict()["mean"]["layer.bias"])
