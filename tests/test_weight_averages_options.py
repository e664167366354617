"""What WeightAverages follows, where it writes, and what it refuses."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fastswa import EMA, LAWA, SWA, WeightAverages
from tests.models import ConvNet, TiedNet, train_step


def updated(model: nn.Module, steps: int = 3, **options: object) -> WeightAverages:
    averages = WeightAverages(model, EMA(0.5), **options)
    for _ in range(steps):
        train_step(model)
        averages.update()
    return averages


def by_hand(trajectory: list[Tensor], decay: float = 0.5) -> Tensor:
    average = trajectory[0].double()
    for tensor in trajectory[1:]:
        average = decay * average + (1 - decay) * tensor.double()
    return average


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "head.*"}, {"head.weight", "head.bias"}),
        ({"include": ["head.*", "conv.weight"]}, {"head.weight", "head.bias", "conv.weight"}),
        ({"include": lambda name: "norm.weight" in name}, {"norm.weight", "head_norm.weight"}),
        ({"include": "head.*", "trainable_only": True}, {"head.weight"}),
        ({"exclude": ["*norm*", "mask", "hidden.*"]}, {"conv.weight", "head.weight", "head.bias", "empty"}),
    ],
)
def test_which_tensors_are_followed(options: dict[str, object], expected: set[str]) -> None:
    assert updated(ConvNet(), **options).weights().keys() == expected


def test_the_three_ways_with_buffers() -> None:
    found = {}
    for buffers in ("copy", "average", "ignore"):
        torch.manual_seed(0)
        model = ConvNet()
        averages = WeightAverages(model, EMA(0.5), buffers=buffers)
        trajectory, flags = [], None
        for _ in range(3):
            train_step(model)
            averages.update()
            trajectory.append(model.norm.running_var.clone())
            flags = model.mask.clone()
        found[buffers] = averages.weights()
        if buffers != "ignore":
            assert torch.equal(found[buffers]["mask"], flags)
            assert torch.equal(found[buffers]["norm.num_batches_tracked"], model.norm.num_batches_tracked)
            # Not in the model's state_dict, so not among the weights either; but swapped in.
            assert "scratch" not in found[buffers]
            with averages.swapped():
                held = model.norm.running_var.clone()
            assert torch.equal(held, found[buffers]["norm.running_var"])
    assert torch.equal(found["copy"]["norm.running_var"], trajectory[-1])
    # Two float32 lerps of numbers below 4.
    assert torch.allclose(found["average"]["norm.running_var"].double(), by_hand(trajectory), rtol=0, atol=1e-6)
    assert not any("running" in name or name == "mask" for name in found["ignore"])


@pytest.mark.parametrize("kind", ["mapping", "pairs", "generator"])
def test_plain_tensors_without_a_module(kind: str) -> None:
    tensors = {"one": torch.randn(5), "two": torch.randn(2, 3)}
    made = {"mapping": tensors, "pairs": list(tensors.items()), "generator": iter(tensors.items())}[kind]
    averages = WeightAverages(made, EMA(0.5))
    trajectory = []
    for _ in range(3):
        for tensor in tensors.values():
            tensor.normal_()
        averages.update()
        trajectory.append(tensors["two"].clone())
    # Two float32 lerps of numbers below 4.
    assert torch.allclose(averages.weights()["two"].double(), by_hand(trajectory), rtol=0, atol=1e-6)
    with averages.swapped():
        assert torch.equal(tensors["two"], averages._averaging.sets.sets[0][1].new_tensor(tensors["two"].tolist()))
    assert torch.equal(tensors["two"], trajectory[-1])


def test_a_mapping_whose_tensors_are_replaced() -> None:
    tensors = {"one": torch.randn(5)}
    averages = WeightAverages(tensors, SWA())
    averages.update()
    tensors["one"] = torch.full((5,), 3.0)
    averages.update()
    tensors["two"] = torch.zeros(1)
    with pytest.raises(ValueError, match="'two' has appeared"):
        averages.update()
    assert averages.n_averaged == {"average": 2}
    averages.refresh()
    averages.update()
    assert averages.weights().keys() == {"one", "two"}


def test_adding_tensors() -> None:
    model = nn.Linear(3, 2)
    averages = updated(model)
    kept = averages.weights()
    scale = torch.full((4,), 2.0)
    averages.add({"scale": scale})
    assert torch.equal(averages.weights()["scale"], scale)
    assert torch.equal(averages.weights()["weight"], kept["weight"])
    scale.fill_(4.0)
    averages.update()
    assert torch.equal(averages.weights()["scale"], torch.full((4,), 3.0))
    with pytest.raises(ValueError, match="'scale' is followed already"):
        averages.add([("scale", scale)])
    with pytest.raises(ValueError, match="'weight' is followed already"):
        averages.add({"weight": scale})


def test_copying_into_another_model() -> None:
    model = TiedNet()
    averages = updated(model)
    other = TiedNet()
    averages.copy_to(other)
    expected = averages.weights()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())
    assert other.head.weight is other.embedding.weight
    averages.copy_to()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the model has no 'layer\.bias'"):
        averages.copy_to(nn.Linear(2, 2))
    wrong = TiedNet()
    wrong.layer.bias = nn.Parameter(torch.zeros(7))
    before = deepcopy(wrong.state_dict())
    with pytest.raises(ValueError, match=r"has shape \(7,\) for 'layer.bias'"):
        averages.copy_to(wrong)
    assert all(torch.equal(tensor, before[key]) for key, tensor in wrong.state_dict().items())


def test_inside_swapped_everything_else_is_refused() -> None:
    model = ConvNet()
    averages = updated(model)
    saved = averages.state_dict()
    with averages.swapped():
        for refused in (
            averages.update,
            averages.swapped().__enter__,
            averages.copy_to,
            averages.weights,
            averages.state_dict,
            lambda: averages.load_state_dict(saved),
            averages.refresh,
            lambda: averages.add({"x": torch.zeros(1)}),
        ):
            with pytest.raises(RuntimeError, match=r"the model holds the average 'average'; leave swapped\(\) first"):
                refused()
    averages.update()


def test_before_the_first_update_there_is_no_average() -> None:
    model = ConvNet()
    averages = WeightAverages(model, {"late": EMA(0.9, start=2), "from the start": SWA(include_start=True)})
    averages.update()
    for refused in (
        lambda: averages.weights("late"),
        averages.swapped("late").__enter__,
        lambda: averages.copy_to(name="late"),
    ):
        with pytest.raises(RuntimeError, match="'late' holds no model yet"):
            refused()
    assert averages.n_averaged == {"late": 0, "from the start": 2}
    with pytest.raises(KeyError, match="no average is called 'early'; there are 'late', 'from the start'"):
        averages.weights("early")
    with pytest.raises(KeyError, match="no average is called None"):
        averages.weights()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": {}}, ValueError, "at least one rule"),
        ({"rules": {"a": 0.9}}, TypeError, "the rule of 'a' must be a Rule"),
        ({"dtype": torch.int32}, ValueError, "dtype must be a floating dtype"),
        ({"buffers": "skip"}, ValueError, "buffers must be"),
        ({"rounding": "up"}, ValueError, "rounding must be"),
        ({"include": "nothing"}, ValueError, "no tensor is averaged"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"model": nn.LazyLinear(3)}, ValueError, "'weight' of the model is not initialised"),
        ({"model": nn.Linear(2, 2, device="meta")}, ValueError, "'weight' of the model is on the meta device"),
        ({"model": {"s": torch.eye(3).to_sparse()}}, TypeError, "'s' is torch.sparse_coo"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"model": ConvNet(), "rules": EMA(0.9), **options}
    with pytest.raises(error, match=message):
        WeightAverages(arguments.pop("model"), arguments.pop("rules"), **arguments)


def test_a_model_that_can_not_be_copied() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise AssertionError("no")

    model = Stubborn(3, 2)
    averages = updated(model)
    with averages.swapped():
        assert torch.equal(model.weight, averages._averaging.selection.followed[-1].tensor)


def test_the_window_keeps_the_latest_models() -> None:
    model = nn.Linear(3, 2)
    averages = WeightAverages(model, LAWA(3))
    trajectory = []
    for _ in range(7):
        train_step(model)
        averages.update()
        trajectory.append(model.weight.detach().double().clone())
        expected = torch.stack(trajectory[-3:]).mean(0)
        # The sum is float64, the result float32.
        assert torch.equal(averages.weights()["weight"], expected.float())


def test_an_exchange_needs_no_third_copy() -> None:
    model = nn.Linear(300, 300)
    averages = updated(model)
    inside = averages.weights()["weight"]
    address = model.weight.data_ptr()
    live = model.weight.detach().clone()
    with averages.swapped():
        assert torch.equal(model.weight, inside)
        # The average's own memory holds the live weights meanwhile.
        assert any(torch.equal(tensor, live) for tensor in averages._averaging.sets.sets[0])
        assert model.weight.data_ptr() == address
    assert torch.equal(model.weight, live)


def test_an_optimizer_and_a_compiled_graph_go_on_after_swapping() -> None:
    model = nn.Linear(3, 2)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averages = WeightAverages(compiled, EMA(0.9))
    x = torch.randn(8, 3)
    for _ in range(4):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
        averages.update()
        with averages.swapped(), torch.no_grad():
            found = averages._averaging.selection.followed
            assert torch.equal(compiled(x), model(x))
            assert all(each.tensor.data_ptr() for each in found)
    assert averages.n_averaged == {"average": 4}
