"""The cyclical schedule: the paper's formula, when to collect, resuming, groups, and what is refused."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

import fastswa
from fastswa import CyclicalSWALR, WeightAverages
from fastswa.schedulers import Shape

CYCLE = 6


def make_optimizer(groups: int = 1, lr: float | Tensor = 1.0) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=lr)


def follow(scheduler: CyclicalSWALR, iterations: int) -> list[tuple[list[float], bool]]:
    """The rates and `collect` that a training loop sees in each iteration."""
    seen = []
    for _ in range(iterations):
        scheduler.optimizer.step()
        seen.append(([float(group["lr"]) for group in scheduler.optimizer.param_groups], scheduler.collect))
        scheduler.step()
    return seen


def paper(i: int, lr_max: float, lr_min: float, c: int) -> float:
    """Equation 1 of the paper."""
    t = (math.fmod(i - 1, c) + 1) / c
    return (1 - t) * lr_max + t * lr_min


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 10, 391])
def test_the_paper_s_formula_to_the_last_bit_for_three_cycles(cycle: int) -> None:
    seen = follow(CyclicalSWALR(make_optimizer(), 0.05, 0.0005, cycle), 3 * cycle)
    for i, ((rate,), collect) in enumerate(seen, 1):
        assert rate == paper(i, 0.05, 0.0005, cycle)
        t = Fraction((i - 1) % cycle + 1, cycle)
        exact = (1 - t) * Fraction(0.05) + t * Fraction(0.0005)
        # t, 1 - t, two products and their sum: five roundings.
        assert abs(Fraction(rate) - exact) <= 5 * Fraction(math.ulp(0.05))
        assert collect == (i % cycle == 0)
    assert seen[-1][0] == [0.0005]


def test_the_cosine_is_sgdr_s() -> None:
    seen = follow(CyclicalSWALR(make_optimizer(), 0.1, 0.02, CYCLE, "cosine"), 3 * CYCLE)
    for i, ((rate,), collect) in enumerate(seen, 1):
        expected = 0.02 + 0.5 * (0.1 - 0.02) * (1 + math.cos(math.pi * ((i - 1) % CYCLE + 1) / CYCLE))
        # Five operations in float64 of numbers up to 0.1.
        assert abs(rate - expected) <= 5 * math.ulp(0.1)
        assert collect == (i % CYCLE == 0)


def test_the_triangle_is_that_of_fast_geometric_ensembling() -> None:
    seen = follow(CyclicalSWALR(make_optimizer(), 0.1, 0.02, CYCLE, "triangular"), 3 * CYCLE)
    for i, ((rate,), collect) in enumerate(seen, 1):
        t = ((i - 1) % CYCLE + 1) / CYCLE
        down = t <= 0.5
        expected = (1 - 2 * t) * 0.1 + 2 * t * 0.02 if down else (2 - 2 * t) * 0.02 + (2 * t - 1) * 0.1
        assert abs(rate - expected) <= 5 * math.ulp(0.1)
        assert collect == (i % CYCLE == CYCLE // 2)
    assert min(rate for (rate,), _ in seen) == seen[CYCLE // 2 - 1][0][0]


@pytest.mark.parametrize("shape", ["linear", "cosine", "triangular"])
def test_models_are_collected_at_the_lowest_rate(shape: Shape) -> None:
    seen = follow(CyclicalSWALR(make_optimizer(), 0.1, 0.02, CYCLE, shape), 3 * CYCLE)
    collected = [rates for rates, collect in seen if collect]
    assert len(collected) == 3
    assert all(math.isclose(rates[0], 0.02) for rates in collected)
    assert min(rates[0] for rates, _ in seen) == min(rates[0] for rates in collected)


@pytest.mark.parametrize("stop", [1, 4, CYCLE, CYCLE + 1])
def test_a_resumed_schedule_goes_on(stop: int) -> None:
    whole = follow(CyclicalSWALR(make_optimizer(2), [0.1, 0.3], [0.02, 0.0], CYCLE), 2 * CYCLE)

    first = CyclicalSWALR(make_optimizer(2), [0.1, 0.3], [0.02, 0.0], CYCLE)
    assert follow(first, stop) == whole[:stop]
    # A copy, because a state_dict shares its lists with the schedule.
    states = copy.deepcopy((first.optimizer.state_dict(), first.state_dict()))
    second = CyclicalSWALR(make_optimizer(2), 0.5, 0.5, 3, "cosine")
    second.load_state_dict(states[1])
    second.optimizer.load_state_dict(states[0])
    assert follow(second, 2 * CYCLE - stop) == whole[stop:]

    optimizer = make_optimizer(2)
    optimizer.load_state_dict(states[0])
    third = CyclicalSWALR(optimizer, [0.1, 0.3], [0.02, 0.0], CYCLE, last_epoch=stop - 1)
    assert follow(third, 2 * CYCLE - stop) == whole[stop:]


def test_groups_that_are_added_later() -> None:
    scheduler = CyclicalSWALR(make_optimizer(2), [0.1, 0.3], [0.02, 0.0], CYCLE)
    follow(scheduler, 2)
    scheduler.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    scheduler.step()
    rates = [group["lr"] for group in scheduler.optimizer.param_groups]
    assert rates == [paper(4, 0.1, 0.02, CYCLE), paper(4, 0.3, 0.0, CYCLE), paper(4, 0.3, 0.0, CYCLE)]

    scheduler.lr_max.append(0.7)
    scheduler.lr_min.append(0.6)
    scheduler.step()
    assert scheduler.get_last_lr()[2] == pytest.approx(paper(5, 0.7, 0.6, CYCLE))


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    rate = torch.tensor(1.0)
    scheduler = CyclicalSWALR(make_optimizer(lr=rate), 0.1, 0.02, CYCLE)
    assert scheduler.optimizer.param_groups[0]["lr"] is rate
    assert follow(scheduler, CYCLE)[-1][0] == [pytest.approx(0.02)]


def test_after_another_schedule() -> None:
    optimizer = make_optimizer()
    before = ConstantLR(optimizer, factor=1.0)
    scheduler = CyclicalSWALR(optimizer, 0.1, 0.02, CYCLE)
    both = SequentialLR(optimizer, [before, scheduler], milestones=[3])
    rates = []
    for _ in range(3 + CYCLE):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        both.step()
    assert rates == [1.0] * 3 + [paper(i, 0.1, 0.02, CYCLE) for i in range(1, CYCLE + 1)]


def test_averages_hold_the_models_at_the_cycles_ends() -> None:
    """Algorithm 1 with a cyclical rate, on a loss whose gradient is 1, in float64 beside both of our averages."""
    model = nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    scheduler = CyclicalSWALR(SGD(model.parameters(), lr=1.0), 0.5, 0.25, 4)
    averaged, averages = fastswa.AveragedModel(model), WeightAverages(model, {"swa": fastswa.SWA()})
    weight, collected = start, []
    for i in range(1, 13):
        model.weight.grad = torch.ones_like(model.weight)
        scheduler.optimizer.step()
        if scheduler.collect:
            averaged.update_parameters(model)
            averages.update()
        scheduler.step()
        weight -= paper(i, 0.5, 0.25, 4)
        if i % 4 == 0:
            collected.append(weight)
    assert len(collected) == 3
    exact = sum(collected) / 3
    # Twelve steps in float32 below 8, each half an ulp off, and the averages' three.
    bound = 15 * torch.finfo(torch.float32).eps * 4
    assert abs(averaged.module.weight.item() - exact) < bound
    assert abs(averages.weights("swa")["weight"].item() - exact) < bound


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr_max": 0.01, "lr_min": 0.1, "cycle_length": 4}, "parameter group 0"),
        ({"lr_max": [0.1, 0.1], "lr_min": [0.1, -0.1], "cycle_length": 4}, "parameter group 1"),
        ({"lr_max": math.inf, "lr_min": 0.1, "cycle_length": 4}, "lr_max=inf"),
        ({"lr_max": math.nan, "lr_min": 0.1, "cycle_length": 4}, "lr_max=nan"),
        ({"lr_max": [0.1], "lr_min": 0.1, "cycle_length": 4}, "lr_max has 1 rates for 2 parameter groups"),
        ({"lr_max": 0.1, "lr_min": 0.1, "cycle_length": 0}, "cycle_length"),
        ({"lr_max": 0.1, "lr_min": 0.1, "cycle_length": 2.0}, "cycle_length"),
        ({"lr_max": 0.1, "lr_min": 0.1, "cycle_length": 3, "shape": "triangular"}, "even"),
        ({"lr_max": 0.1, "lr_min": 0.1, "cycle_length": 4, "shape": "square"}, "shape"),
    ],
)
def test_refusals_leave_the_optimizer_as_it_was(arguments: dict[str, object], words: str) -> None:
    optimizer = make_optimizer(2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        CyclicalSWALR(optimizer, **arguments)  # type: ignore[arg-type]
    assert optimizer.state_dict() == before
