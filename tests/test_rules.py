"""The rules' formulas, schedules and refusals."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastswa
from fastswa import (
    EMA,
    LAWA,
    SWA,
    AnnealingWarmup,
    ExponentialWarmup,
    HalfLifeWarmup,
    InversePowerWarmup,
    PowerEMA,
    RatioWarmup,
)
from fastswa.rules import Rule
from fastswa.warmups import Warmup

# A rule and the decay 1 - w(n) for n of 1, 2, ..., written as the peer's code has it.
DECAYS: dict[str, tuple[Rule, Callable[[int], float | Fraction]]] = {
    "swa": (SWA(), lambda n: Fraction(n, n + 1)),
    "ema": (EMA(0.75), lambda n: 0.75),
    "ratio": (EMA(0.8, warmup=RatioWarmup()), lambda n: min(0.8, Fraction(1 + n, 10 + n))),
    "ratio_bounds": (
        EMA(0.8, warmup=RatioWarmup(min_decay=0.25, update_after_step=3)),
        lambda n: 0 if n <= 3 else max(0.25, min(0.8, Fraction(n - 2, n + 7))),
    ),
    "inverse_power": (
        EMA(0.9, warmup=InversePowerWarmup(inv_gamma=2, power=0.75)),
        lambda n: min(0.9, 1 - math.exp(-0.75 * math.log1p(n / 2))),
    ),
    "inverse_power_bounds": (
        EMA(0.9, warmup=InversePowerWarmup(min_decay=0.6, update_after_step=5)),
        lambda n: 0 if n <= 5 else max(0.6, min(0.9, 1 - math.exp(-2 / 3 * math.log1p(n - 5)))),
    ),
    "ultralytics": (EMA(0.99, warmup=ExponentialWarmup(tau=20)), lambda n: -0.99 * math.expm1(-n / 20)),
    # In mmdetection's terms: the weight is (1 - momentum) exp(-(1 + steps) / gamma) + momentum.
    "mmdetection": (
        EMA(0.99, warmup=ExponentialWarmup(tau=20, offset=1)),
        lambda n: 1 - ((1 - 0.01) * math.exp(-(1 + n) / 20) + 0.01),
    ),
    "mmengine": (EMA(0.9, warmup=AnnealingWarmup(gamma=7)), lambda n: 1 - max(Fraction(1, 10), Fraction(7, 7 + n))),
    "torchtitan": (EMA(1.0, warmup=HalfLifeWarmup(0.05)), lambda n: 0.5 ** (20 / n)),
    "half_life_capped": (EMA(0.5, warmup=HalfLifeWarmup(0.25)), lambda n: min(0.5, 0.5 ** (4 / n))),
    "power": (PowerEMA(gamma=3), lambda n: Fraction(n, n + 1) ** 4),
    "power_fraction": (PowerEMA(gamma=6.94), lambda n: math.exp(7.94 * math.log1p(-1 / (n + 1)))),
}
RULES = {
    **{name: rule for name, (rule, _) in DECAYS.items()},
    "lawa": LAWA(3),
    "lawa_one": LAWA(1),
    "scheduled": EMA(0.9, start=4, every=3),
}


@pytest.mark.parametrize("name", DECAYS)
def test_the_weights_are_the_formulas(name: str) -> None:
    rule, decay = DECAYS[name]
    assert rule.copy_weights(0) == (1.0,)
    for n in (*range(1, 60), 1000, 10**6):
        # A weight is a difference from 1, so it is exact to a few units of float64 at 1; a power errs by its exponent,
        # here at most 8, times the half unit of n / (n + 1).
        assert rule.weight(n) == pytest.approx(float(1 - decay(n)), rel=0, abs=2e-15), n
        assert rule.copy_weights(n) == (rule.weight(n),)
        assert 0 <= rule.weight(n) <= 1


@pytest.mark.parametrize("name", RULES)
def test_int_and_tensor_agree(name: str) -> None:
    rule = RULES[name]
    for n in (0, 1, 2, 3, 4, 7, 50, 2**24 + 1):
        for dtype in (torch.int64, torch.float64):
            counter = torch.tensor(n, dtype=dtype)
            weights = rule.copy_weights(counter)
            assert len(weights) == rule.copies
            for ours, number in zip(weights, rule.copy_weights(n), strict=True):
                assert isinstance(ours, Tensor)
                assert (ours.dtype, ours.shape) == (torch.float64, ())
                # Two implementations of exp and of powers, each within a unit or two.
                assert float(ours) == pytest.approx(number, rel=0, abs=2e-15)
            due = rule.due(counter)
            assert isinstance(due, Tensor)
            assert due.dtype == torch.bool
            assert bool(due) is rule.due(n)


@pytest.mark.parametrize("name", RULES)
def test_no_value_is_read_from_a_tensor(name: str) -> None:
    # A meta tensor has no value, so any read raises.
    for dtype in (torch.int64, torch.float64):
        counter = torch.tensor(5, dtype=dtype, device="meta")
        assert all(weight.is_meta for weight in RULES[name].copy_weights(counter))
        assert RULES[name].due(counter).is_meta


@pytest.mark.parametrize("warmup", [AnnealingWarmup(gamma=1), InversePowerWarmup(power=1.0)], ids=repr)
def test_warmups_that_begin_as_the_equal_average(warmup: Warmup) -> None:
    rule = EMA(0.99, warmup=warmup)
    assert [rule.weight(n) for n in range(1, 99)] == pytest.approx([1 / (n + 1) for n in range(1, 99)], rel=1e-13)
    assert rule.weight(500) == pytest.approx(0.01)


def test_due() -> None:
    assert [step for step in range(20) if SWA().due(step)] == list(range(20))
    assert [step for step in range(20) if SWA(start=3).due(step)] == list(range(3, 20))
    assert [step for step in range(20) if EMA(0.9, start=2, every=5).due(step)] == [2, 7, 12, 17]
    assert SWA().due(0) is True


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_lawa_is_the_mean_of_the_latest_models(window: int) -> None:
    rule = LAWA(window)
    models = torch.randn(12, 4, dtype=torch.float64)
    sets = torch.full((rule.copies, 4), float("nan"), dtype=torch.float64)
    for n, model in enumerate(models):
        weights = rule.copy_weights(n)
        assert sorted(weights) == [0.0] * (window - 1) + [1.0]
        sets[weights.index(1.0)] = model
        mixture = rule.mixture(n + 1)
        assert sum(mixture) == pytest.approx(1)
        average = sum(share * kept for share, kept in zip(mixture, sets, strict=True) if share)
        assert torch.allclose(average, models[max(0, n + 1 - window) : n + 1].mean(0), rtol=1e-14, atol=1e-15)


def test_one_set_is_the_average_itself() -> None:
    for rule in (SWA(), EMA(0.9), PowerEMA(gamma=2.0)):
        assert rule.copies == 1
        assert rule.mixture(1) == rule.mixture(1000) == (1.0,)
    for rule in (SWA(), LAWA(2)):
        with pytest.raises(ValueError, match="n must be an int of at least 1, got 0"):
            rule.mixture(0)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.25, 12**-0.5])
def test_the_width_of_a_power_ema_is_that_of_its_profile(sigma_rel: float) -> None:
    rule = PowerEMA(sigma_rel=sigma_rel)
    # The moments of the density (gamma + 1) t^gamma on [0, 1]. At the upper end the root is a double one.
    first, second = (rule.gamma + 1) / (rule.gamma + 2), (rule.gamma + 1) / (rule.gamma + 3)
    assert math.sqrt(second - first**2) == pytest.approx(sigma_rel, rel=1e-6)
    assert rule.sigma_rel == pytest.approx(sigma_rel, rel=1e-9)


def test_printed_and_compared_as_written() -> None:
    assert [repr(rule) for rule in (SWA(), EMA(decay=0.9), LAWA(5), PowerEMA(gamma=2))] == [
        "SWA()",
        "EMA(decay=0.9)",
        "LAWA(window=5)",
        "PowerEMA(gamma=2.0)",
    ]
    rules = [
        SWA(start=3, include_start=True),
        EMA(0.9, warmup=RatioWarmup(), every=4),
        EMA(0.9, warmup=InversePowerWarmup(update_after_step=2)),
        PowerEMA(gamma=2.5, start=7),
        LAWA(5, every=100),
    ]
    for rule in rules:
        assert eval(repr(rule), vars(fastswa)) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        changed = dataclasses.replace(rule, start=9)
        assert changed.start == 9
        assert changed != rule
        assert dataclasses.replace(changed, start=rule.start) == rule
        assert len({rule, dataclasses.replace(rule)}) == 1
    assert repr(rules[0]) == "SWA(start=3, include_start=True)"


NAN = float("nan")
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "start": (lambda: SWA(start=-1), ValueError, "start must be an int of at least 0, got -1"),
    "start_nan": (lambda: EMA(0.9, start=NAN), ValueError, "start must be an int of at least 0, got nan"),
    "every": (lambda: LAWA(2, every=0), ValueError, "every must be an int of at least 1, got 0"),
    "every_power": (lambda: PowerEMA(gamma=1, every=0.5), ValueError, "every must be an int of at least 1, got 0.5"),
    "window": (lambda: LAWA(0), ValueError, "window must be an int of at least 1, got 0"),
    "decay": (lambda: EMA(1.5), ValueError, r"decay must be in \[0, 1\], got 1.5"),
    "decay_nan": (lambda: EMA(NAN), ValueError, r"decay must be in \[0, 1\], got nan"),
    "warmup": (lambda: EMA(0.9, warmup=True), TypeError, "warmup must be a Warmup .* got True"),
    "power_none": (lambda: PowerEMA(), TypeError, "give one of gamma and sigma_rel"),
    "power_both": (lambda: PowerEMA(gamma=1, sigma_rel=0.1), TypeError, "give one of gamma and sigma_rel"),
    "gamma": (lambda: PowerEMA(gamma=-0.5), ValueError, "gamma must be at least 0 and finite, got -0.5"),
    "gamma_nan": (lambda: PowerEMA(gamma=NAN), ValueError, "gamma must be at least 0 and finite, got nan"),
    "sigma_wide": (lambda: PowerEMA(sigma_rel=0.3), ValueError, r"sigma_rel must be in \(0, .* got 0.3"),
    "sigma_nan": (lambda: PowerEMA(sigma_rel=NAN), ValueError, r"sigma_rel must be in \(0, .* got nan"),
    "min_decay": (lambda: RatioWarmup(min_decay=2), ValueError, r"min_decay must be in \[0, 1\], got 2"),
    "after": (lambda: RatioWarmup(update_after_step=-1), ValueError, "update_after_step must be at least 0, got -1"),
    "inv_gamma": (lambda: InversePowerWarmup(inv_gamma=0), ValueError, "inv_gamma must be above 0 and finite, got 0"),
    "power": (lambda: InversePowerWarmup(power=NAN), ValueError, "power must be above 0 and finite, got nan"),
    "tau": (lambda: ExponentialWarmup(tau=-1), ValueError, "tau must be above 0 and finite, got -1"),
    "offset": (lambda: ExponentialWarmup(offset=NAN), ValueError, "offset must be at least 0, got nan"),
    "annealing": (lambda: AnnealingWarmup(gamma=math.inf), ValueError, "gamma must be above 0 and finite, got inf"),
    "fraction": (lambda: HalfLifeWarmup(0), ValueError, "fraction must be above 0 and finite, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("rule", [LAWA(1), LAWA(3), SWA(start=2), EMA(0.9, every=2), SWA(include_start=True)], ids=repr)
def test_a_multi_avg_fn_averages_at_every_call(rule: Rule) -> None:
    tensors = [torch.zeros(2)]
    with pytest.raises(TypeError, match=r"fastswa\.WeightAverages"):
        rule(tensors, [torch.ones(2)], 1)
    assert not tensors[0].any()
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"fastswa\.WeightAverages"):
        fastswa.AveragedModel(model, multi_avg_fn=rule)
    with pytest.raises(TypeError, match=r"fastswa\.WeightAverages"):
        fastswa.AveragedModel(model, avg_fn=rule)
    averaged = fastswa.AveragedModel(model)
    averaged.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    with torch.no_grad():
        model.weight += 1
    averaged.multi_avg_fn = rule
    for _ in range(2):
        with pytest.raises(TypeError, match=r"fastswa\.WeightAverages"):
            averaged.update_parameters(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in averaged.state_dict().items())
    averaged.multi_avg_fn = None
    averaged.update_parameters(model)
    assert torch.allclose(averaged.module.weight, before["module.weight"] + 0.5)


@pytest.mark.parametrize("name", ["ratio", "inverse_power_bounds", "torchtitan", "power_fraction"])
@pytest.mark.parametrize("averaged_model", [fastswa.AveragedModel, swa_utils.AveragedModel], ids=["fastswa", "torch"])
def test_new_rules_in_averaged_models(averaged_model: type[swa_utils.AveragedModel], name: str) -> None:
    model = nn.Linear(5, 3).double()
    rule, decay = DECAYS[name]
    averaged = averaged_model(model, multi_avg_fn=rule)
    exact = torch.zeros(3, 5, dtype=torch.float64)
    for n in range(20):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        averaged.update_parameters(model)
        exact += (float(1 - decay(n)) if n else 1.0) * (model.weight.detach() - exact)
        assert torch.allclose(averaged.module.weight, exact, rtol=1e-13, atol=1e-14)


def test_the_weight_of_lawa_says_where_to_look() -> None:
    with pytest.raises(TypeError, match="copy_weights and mixture"):
        LAWA(2).weight(3)


def test_a_rule_of_the_users_own() -> None:
    class Half(Rule):
        def weight(self, n: int | Tensor) -> float:
            return 0.5

    rule = Half(start=1)
    assert repr(rule) == "Half(start=1)"
    assert rule.copy_weights(0) == (1.0,)
    assert rule.copy_weights(torch.tensor(3))[0].item() == 0.5
    averaged = [torch.zeros(2)]
    Half()(averaged, [torch.ones(2)], torch.tensor(4))
    assert averaged[0].tolist() == [0.5, 0.5]
