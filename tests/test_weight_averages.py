"""WeightAverages: one table of algorithms, and what holds for all of them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from fastswa import EMA, LAWA, SWA, PowerEMA, RatioWarmup, WeightAverages
from fastswa.rules import Rule
from tests.models import ComplexNet, ConvNet, TiedNet, train_step

ALGORITHMS: dict[str, Rule] = {
    "SWA": SWA(),
    "SWA from the start": SWA(include_start=True),
    "EMA": EMA(0.9),
    "EMA with warm-up": EMA(0.99, warmup=RatioWarmup()),
    "PowerEMA": PowerEMA(gamma=6.94),
    "LAWA": LAWA(3),
    "EMA now and then": EMA(0.8, start=2, every=3),
}
PRECISIONS = {
    "float32": {},
    "model's own": {"dtype": None},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 7},
}


@pytest.fixture(params=ALGORITHMS)
def rule(request: pytest.FixtureRequest) -> Rule:
    """Each algorithm."""
    return ALGORITHMS[request.param]


@pytest.fixture(params=PRECISIONS)
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    """Each way to keep averages."""
    return PRECISIONS[request.param]


def small() -> nn.Module:
    """A few tensors, some of odd sizes, with BatchNorm's statistics and counters."""
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))


def exact(rule: Rule, start: list[Tensor], models: list[list[Tensor]]) -> list[Tensor]:
    """The average of a trajectory in float64, by the rule's definition."""
    taken = [start] if rule.include_start else []
    taken += [
        model for step, model in enumerate(models) if step >= rule.start and (step - rule.start) % rule.every == 0
    ]
    if isinstance(rule, LAWA):
        latest = taken[-rule.window :]
        return [torch.stack(tensors).mean(0) for tensors in zip(*latest, strict=True)]
    average = taken[0]
    for n, model in enumerate(taken[1:], 1):
        weight = rule.weight(n)
        average = [a + weight * (p - a) for a, p in zip(average, model, strict=True)]
    return average


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().double().clone() for parameter in model.parameters()]


def averages_of(averages: WeightAverages, model: nn.Module, name: str | None = None) -> list[Tensor]:
    found = averages.weights(name)
    return [found[key] for key, _ in model.named_parameters()]


TOGETHER = [*([name] for name in ALGORITHMS), *(list(ALGORITHMS)[first : first + 3] for first in (0, 2, 4))]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
@pytest.mark.parametrize("precision", ["float32", "bfloat16, stochastic"])
def test_two_hundred_steps_follow_float64(names: list[str], precision: str, backend: str) -> None:
    # The interpreter takes milliseconds for each tensor.
    model = small() if backend == "torch" else nn.Linear(5, 3, bias=False)
    rules = {name: ALGORITHMS[name] for name in names}
    averages = WeightAverages(model, rules, backend=backend, **PRECISIONS[precision])
    start, models = values(model), []
    for _ in range(200):
        train_step(model)
        averages.update()
        models.append(values(model))
    largest = max(tensor.abs().max() for model in models for tensor in model)
    ulp = torch.finfo(torch.bfloat16 if "bfloat16" in precision else torch.float32).eps * largest
    # Each update adds an error of at most 1.5 ulp (float32) or, stochastic, of at most one ulp and zero mean; later
    # updates only shrink it. So 200 add up to 300 ulp at worst, and to six standard deviations of a random walk.
    bound = 300 * ulp if precision == "float32" else 6 * 200**0.5 * ulp / 2
    for name, rule in rules.items():
        expected = exact(rule, start, models)
        for average, target in zip(averages_of(averages, model, name), expected, strict=True):
            assert (average.double() - target).abs().max() <= bound, name


def test_stochastic_rounding_moves_where_nearest_stands_still() -> None:
    weight = nn.Parameter(torch.rand(4000) + 1)
    model = nn.ParameterDict({"weight": weight})
    stochastic = WeightAverages(model, EMA(0.9999), dtype=torch.bfloat16, rounding="stochastic")
    nearest = WeightAverages(model, EMA(0.9999), dtype=torch.bfloat16)
    ours, theirs, start = (source.detach().bfloat16().double() for source in (weight, weight, weight))
    with torch.no_grad():
        stochastic.update()
        nearest.update()
        weight.mul_(1.1)
    target = start.clone()
    for _ in range(2000):
        stochastic.update()
        nearest.update()
        target += 1e-4 * (weight.detach().double() - target)
    moved = (target - start).mean()
    ours, theirs = (averages.weights()["weight"].double() for averages in (stochastic, nearest))
    # The bound that was asked for. The rounding noise of 4000 elements averages to under 1e-4 of a value near 1.5.
    assert abs((ours - target).mean()) < 0.02 * moved
    assert (theirs - start).abs().max() == 0


def save_and_load(averages: WeightAverages) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(averages.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rule: Rule, options: dict[str, object]) -> None:
    model = ConvNet()
    whole = WeightAverages(model, {"one": rule, "other": EMA(0.5)}, **options)
    for _ in range(5):
        train_step(model)
        whole.update()
    saved = save_and_load(whole)
    resumed = WeightAverages(model, {"one": rule, "other": EMA(0.5)}, **options)
    resumed.load_state_dict(saved)
    for _ in range(6):
        train_step(model)
        whole.update()
        resumed.update()
    assert resumed.n_averaged == whole.n_averaged
    for name in ("one", "other"):
        ours, theirs = whole.weights(name), resumed.weights(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_swapping_is_undone_bit_for_bit(rule: Rule, options: dict[str, object]) -> None:
    model = ConvNet()
    averages = WeightAverages(model, rule, **options)
    for _ in range(4):
        train_step(model)
        averages.update()
    train_step(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    average = averages.weights()
    for error in (None, RuntimeError("body"), KeyboardInterrupt()):
        addresses = [tensor.data_ptr() for tensor in model.parameters()]
        with nullcontext() if error is None else pytest.raises(type(error)), averages.swapped():
            held = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            model.norm.running_mean.fill_(3)  # update_bn, say
            if error is not None:
                raise error
        assert all(torch.equal(held[key], average[key].to(held[key].dtype)) for key in held)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert addresses == [tensor.data_ptr() for tensor in model.parameters()]
    again = averages.weights()
    assert all(torch.equal(again[key], average[key]) for key in average)


def test_copies_and_pickles_go_on_by_themselves(rule: Rule, options: dict[str, object]) -> None:
    model = ConvNet()
    averages = WeightAverages(model, rule, **options)
    for _ in range(4):
        train_step(model)
        averages.update()
    for copy in (deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other_model, other = copy((model, averages))
        kept = averages.weights()
        for _ in range(4):
            train_step(other_model)
            other.update()
        assert all(torch.equal(tensor, averages.weights()[key]) for key, tensor in kept.items())
        assert next(iter(other.n_averaged.values())) > next(iter(averages.n_averaged.values()))
        assert not torch.equal(other.weights()["hidden.weight"], kept["hidden.weight"])


def test_the_model_may_change_its_dtype_and_memory(rule: Rule, options: dict[str, object]) -> None:
    model = small()
    averages = WeightAverages(model, rule, **options)
    start, models = values(model), []
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.half, nn.Module.float, deepcopy_weights):
        change(model)
        train_step(model)
        averages.update()
        models.append(values(model))
    dtype = options.get("dtype", torch.float32) or torch.float32
    largest = max(tensor.abs().max() for model in models for tensor in model)
    for average, target in zip(averages_of(averages, model), exact(rule, start, models), strict=True):
        assert average.dtype == dtype
        # Five updates, each of at most 1.5 ulp.
        assert (average.double() - target).abs().max() <= 8 * torch.finfo(dtype).eps * largest


def deepcopy_weights(model: nn.Module) -> None:
    """Other memory, and other Parameter objects."""
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().clone()))


def test_a_compiled_or_wrapped_model_is_the_model(rule: Rule, options: dict[str, object]) -> None:
    for wrap in (lambda model: torch.compile(model, backend="eager"), DataParallel):
        model = small()
        plain = deepcopy(model)
        wrapped = wrap(model)
        ours, theirs = WeightAverages(wrapped, rule, **options), WeightAverages(plain, rule, **options)
        for seed in range(4):
            for each, averages in ((model, ours), (plain, theirs)):
                torch.manual_seed(seed)
                train_step(each)
                averages.update()
        found, expected = ours.weights(), theirs.weights()
        assert found.keys() == expected.keys() == plain.state_dict().keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        with ours.swapped():
            assert torch.equal(wrapped(torch.ones(2, 5)), model(torch.ones(2, 5)))


def test_tied_weights_are_averaged_once(rule: Rule, options: dict[str, object]) -> None:
    model = TiedNet()
    averages = WeightAverages(model, rule, **options)
    for _ in range(4):
        train_step(model)
        averages.update()
    found = averages.weights()
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    assert found["head.weight"].data_ptr() != found["embedding.weight"].data_ptr()
    other = TiedNet()
    other.load_state_dict(found)
    assert other.head.weight is other.embedding.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.append(nn.Linear(1, 1)), "'3.weight' has appeared in the model"),
        (lambda model: model.__delitem__(2), "'2.weight' is no longer in the model"),
        (lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(9))), r"'0.bias' had shape \(7,\) and now"),
    ],
)
def test_a_model_that_changed_is_refused_until_accepted(
    rule: Rule, options: dict[str, object], change: Callable[[nn.Module], object], message: str
) -> None:
    model = small()
    averages = WeightAverages(model, rule, **options)
    for _ in range(3):
        train_step(model)
        averages.update()
    kept = averages.weights()
    change(model)
    for refused in (averages.update, averages.swapped().__enter__, averages.copy_to):
        with pytest.raises(ValueError, match=message):
            refused()
    assert all(torch.equal(tensor, averages.weights()[key]) for key, tensor in kept.items())
    averages.refresh()
    assert torch.equal(averages.weights()["0.weight"], kept["0.weight"])
    assert averages.weights().keys() == model.state_dict().keys()
    train_step(model)
    averages.update()


def test_a_state_of_something_else_is_refused(rule: Rule, options: dict[str, object]) -> None:
    model = small()
    averages = WeightAverages(model, {"one": rule}, **options)
    averages.update()
    kept = averages.weights("one") if averages.n_averaged["one"] else None
    others = {
        "the rule of 'one' is EMA": WeightAverages(model, {"one": EMA(0.123)}, **options),
        "the rule of 'two' is": WeightAverages(model, {"one": rule, "two": SWA()}, **options),
        r"'0.bias' of the average 'one' is torch\..* \(6,\) in the file and torch\..* \(7,\) here": WeightAverages(
            nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)), {"one": rule}, **options
        ),
        "'0.weight' of the average 'one' is only here": WeightAverages(
            model, {"one": rule}, exclude="0.weight", **options
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            averages.load_state_dict(save_and_load(other))
    if kept is not None:
        assert all(torch.equal(tensor, averages.weights("one")[key]) for key, tensor in kept.items())


def test_complex_weights(rule: Rule, options: dict[str, object]) -> None:
    model = ComplexNet()
    averages = WeightAverages(model, rule, **options)
    for _ in range(4):
        train_step(model)
        averages.update()
    found = averages.weights()
    assert found["filter"].dtype == torch.complex64
    with averages.swapped():
        assert torch.equal(model.filter, found["filter"])


@pytest.mark.parametrize("counting", ["host", "device"])
def test_a_skipped_update_never_happened(rule: Rule, options: dict[str, object], counting: str) -> None:
    model = small()
    skipping = WeightAverages(model, rule, capturable=counting == "device", **options)
    without = WeightAverages(model, rule, **options)
    for step in range(9):
        train_step(model)
        skip = step % 4 == 1
        skipping.update(torch.tensor([float(skip)]))
        if not skip:
            without.update()
    assert skipping.n_averaged == without.n_averaged
    ours, theirs = skipping.weights(), without.weights()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
