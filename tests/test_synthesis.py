"""Post-hoc synthesis against averages of the whole trajectory."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastswa import EMA, PowerEMA, Snapshot, WeightAverages, profiles, synthesize

MODELS = 300
WIDTHS = (0.05, 0.1)
TIMES = range(50, MODELS + 1, 50)


def trajectory(dtype: torch.dtype = torch.float64) -> Tensor:
    """A random walk of a few hundred models with seven weights."""
    return torch.randn(MODELS, 7, dtype=torch.float64).cumsum(0).to(dtype)


def average(models: Tensor, rule: PowerEMA, n: int) -> Tensor:
    """The average of the first n models, by the recursion in float64."""
    result = torch.zeros_like(models[0], dtype=torch.float64)
    for index, model in enumerate(models[:n]):
        result += rule.copy_weights(index)[0] * (model.double() - result)
    return result


def stored(models: Tensor) -> list[Snapshot]:
    return [
        Snapshot(n, rule.gamma, {"weight": average(models, rule, n).to(models.dtype)})
        for n in TIMES
        for rule in (PowerEMA(sigma_rel=width) for width in WIDTHS)
    ]


@pytest.mark.parametrize("gamma", [0, 1, 7, 17])
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_profile_is_that_of_the_recursion(n: int, gamma: int) -> None:
    weights = [Fraction(0)] * (n + 2)
    for index in range(n):
        decay = Fraction(index, index + 1) ** (gamma + 1)
        weights = [weight * decay for weight in weights]
        weights[index] += 1 - decay
        assert PowerEMA(gamma=gamma).copy_weights(index)[0] == pytest.approx(float(1 - decay), rel=0, abs=4e-15)
    ours = profiles.profile(np.arange(n + 2), n, float(gamma))
    # A power errs by its exponent times one rounding, and twice so here.
    np.testing.assert_allclose(ours, np.array([float(weight) for weight in weights]), rtol=(gamma + 2) * 2.0**-52)
    assert ours.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("step", [MODELS, 270, 200, 61])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.075, 0.09, 0.12, 0.15])
def test_another_width_equals_the_average_of_the_trajectory(sigma_rel: float, step: int) -> None:
    models, target = trajectory(), PowerEMA(sigma_rel=sigma_rel)
    snapshots = stored(models)
    ours = synthesize(snapshots, sigma_rel=sigma_rel, step=step)["weight"]
    theirs = average(models, target, step)
    counts, gammas = [snapshot.n for snapshot in snapshots], [snapshot.gamma for snapshot in snapshots]
    coefficients, residual = profiles.fit(counts, gammas, step, target.gamma)
    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    # The misfit of the weights times the trajectory's size (Cauchy and Schwarz); both have the sum 1, so its mean is
    # free. Then the roundings of float64, one for each model and stored average.
    size = (models - models.mean(0)).square().sum(0).sqrt()
    rounding = 2.0**-52 * MODELS * models.abs().amax(0) * sum(map(abs, coefficients))
    assert ((ours - theirs).abs() <= residual * size + rounding).all()
    # The bound says something: at a stored time, between the stored widths and near them, the misfit is small.
    if step == MODELS and sigma_rel > 0.05:
        assert residual <= 0.06 * np.linalg.norm(profiles.profile(np.arange(MODELS), step, target.gamma))


def test_the_fit_is_the_best_one() -> None:
    counts = [n for n in TIMES for _ in WIDTHS]
    gammas = [PowerEMA(sigma_rel=width).gamma for _ in TIMES for width in WIDTHS]
    coefficients, residual = profiles.fit(counts, gammas, 280, 9.0)
    models = np.arange(MODELS)
    columns = np.stack([profiles.profile(models, n, gamma) for n, gamma in zip(counts, gammas, strict=True)], axis=1)
    misfit = columns @ coefficients - profiles.profile(models, 280, 9.0)
    assert np.linalg.norm(misfit) == pytest.approx(residual, rel=1e-9)
    # At the minimum under the condition of the sum, the misfit is at right angles to every direction that keeps it.
    slopes = columns.T @ misfit
    assert np.ptp(slopes) <= 1e-13


def test_long_runs_are_fitted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profiles.fit([100, 300, 300], [7.0, 7.0, 17.0], 250, 10.0)
    monkeypatch.setattr(profiles, "ROWS", 64)
    parts = profiles.fit([100, 300, 300], [7.0, 7.0, 17.0], 250, 10.0)
    assert parts[0] == pytest.approx(whole[0], rel=1e-11)
    assert parts[1] == pytest.approx(whole[1], rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_a_stored_average_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    snapshots = [
        Snapshot(n, PowerEMA(sigma_rel=width).gamma, {"weight": torch.randn(5, 3).to(dtype), "steps": torch.tensor(n)})
        for n in TIMES
        for width in WIDTHS
    ]
    # Nothing is multiplied by a share of 0.
    snapshots[0].weights["weight"].fill_(float("inf"))
    for snapshot in snapshots[1:]:
        ours = synthesize(snapshots, gamma=snapshot.gamma, step=snapshot.n)
        assert torch.equal(ours["weight"], snapshot.weights["weight"])
        assert ours["weight"].dtype == dtype
        assert int(ours["steps"]) == snapshot.n
        assert ours["weight"] is not snapshot.weights["weight"]
    assert torch.equal(synthesize(snapshots, sigma_rel=0.1)["weight"], snapshots[2 * len(TIMES) - 1].weights["weight"])


def test_what_did_not_change_is_returned_unchanged() -> None:
    constant = torch.randn(100)
    snapshots = [Snapshot(n, gamma, {"weight": constant.clone()}) for n in (40, 80) for gamma in (7.0, 17.0)]
    # Summed in float64, so the coefficients' roundings vanish in the rounding to float32.
    assert torch.equal(synthesize(snapshots, gamma=11.0)["weight"], constant)


def test_low_precision_is_summed_in_float64() -> None:
    models = trajectory(torch.float16)
    snapshots = stored(models)
    ours = synthesize(snapshots, sigma_rel=0.075)["weight"]
    wide = [Snapshot(each.n, each.gamma, {"weight": each.weights["weight"].double()}) for each in snapshots]
    assert ours.dtype == torch.float16
    assert torch.equal(ours, synthesize(wide, sigma_rel=0.075)["weight"].half())


def test_states_in_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    snapshots = stored(trajectory(torch.float32))
    expected = synthesize(snapshots, sigma_rel=0.075)
    mappings: list[Any] = [{"n": each.n, "gamma": each.gamma, "weights": dict(each.weights)} for each in snapshots]
    torches, safes = [], []
    for index, state in enumerate(mappings):
        torch.save(state, tmp_path / f"{index}.pt")
        torches.append(str(tmp_path / f"{index}.pt"))
        safes.append(tmp_path / f"{index}.safetensors")
        save_file(state["weights"], safes[-1], metadata={"n": str(state["n"]), "gamma": repr(state["gamma"])})
    for states in (mappings, torches, safes, [*mappings[:3], *torches[3:6], *safes[6:]]):
        assert torch.equal(synthesize(states, sigma_rel=0.075)["weight"], expected["weight"])
    torch.save({"n": 3, "weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt has no 'gamma'"):
        synthesize([tmp_path / "other.pt"], gamma=1.0)


def snapshot(n: int = 10, gamma: float = 7.0, **weights: Tensor) -> Snapshot:
    return Snapshot(n, gamma, weights or {"weight": torch.zeros(2)})


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "none": ([], {"gamma": 1.0}, "no snapshots"),
    "n": ([snapshot(0)], {"gamma": 1.0}, "n of snapshot 0 must be at least 1, got 0"),
    "gamma": ([snapshot(), snapshot(gamma=float("nan"))], {"gamma": 1.0}, "snapshot 1: gamma must be at least 0"),
    "target": ([snapshot()], {"gamma": -1.0}, "gamma must be at least 0"),
    "step": ([snapshot()], {"gamma": 1.0, "step": 11}, "step must be from 1 to 10, .* got 11"),
    "step_0": ([snapshot()], {"gamma": 1.0, "step": 0}, "step must be from 1 to 10, .* got 0"),
    "twice": (
        [snapshot(), snapshot()],
        {"gamma": 1.0},
        r"snapshot 1 has the n \(10\) and gamma \(7\.0\) of an earlier",
    ),
    "alike": ([snapshot(1), snapshot(1, 9.0)], {"gamma": 1.0}, "the 2 snapshots are too alike"),
    "many": ([snapshot(2, 1.0 * i) for i in range(4)], {"gamma": 1.5}, "the 4 snapshots are too alike"),
    "close": ([snapshot(gamma=7 + 1e-14 * i) for i in range(5)], {"gamma": 1.0}, "the 5 snapshots are too alike"),
    "missing": (
        [snapshot(), snapshot(5, bias=torch.zeros(2))],
        {"gamma": 1.0},
        "only snapshot 1 of 0 and 1 has 'bias'",
    ),
    "shape": ([snapshot(), snapshot(5, weight=torch.zeros(3))], {"gamma": 1.0}, r"'weight' is \(2,\) .* \(3,\)"),
    "dtype": ([snapshot(), snapshot(5, weight=torch.zeros(2).half())], {"gamma": 1.0}, "'weight' is .*torch.float16"),
    "entry": ([{"n": 3, "gamma": 1.0}], {"gamma": 1.0}, "the state has no 'weights'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    snapshots, arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        synthesize(snapshots, **arguments)


def test_one_width_is_asked_for() -> None:
    for arguments in ({}, {"gamma": 1.0, "sigma_rel": 0.1}):
        with pytest.raises(TypeError, match="give one of gamma and sigma_rel"):
            synthesize([snapshot()], **arguments)


def test_from_training_to_another_width(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).double()
    widths = {"narrow": PowerEMA(sigma_rel=WIDTHS[0]), "wide": PowerEMA(sigma_rel=WIDTHS[1])}
    averages = WeightAverages(model, widths, dtype=torch.float64)
    models, files = [], []
    for step in range(1, MODELS + 1):
        with torch.no_grad():
            model.weight += torch.randn(2, 3, dtype=torch.float64)
        averages.update()
        models.append(model.weight.detach().flatten().clone())
        if step in TIMES:
            for name in widths:
                files.append(tmp_path / f"{name}-{step}.pt")
                Snapshot.of(averages, name).save(files[-1])
    found = synthesize(files, sigma_rel=0.075)
    model.load_state_dict(found)
    target = PowerEMA(sigma_rel=0.075)
    counts = [step for step in TIMES for _ in widths]
    _, residual = profiles.fit(counts, [rule.gamma for rule in widths.values()] * len(TIMES), MODELS, target.gamma)
    trained = torch.stack(models)
    size = (trained - trained.mean(0)).square().sum(0).sqrt()
    # The misfit of the weights times the trajectory's size, as above; rounding is far below it.
    error = (found["weight"].flatten() - average(trained, target, MODELS)).abs()
    assert (error <= residual * size).all()
    # And better than either stored average.
    for name in widths:
        assert (
            error.norm() < 0.2 * (averages.weights(name)["weight"].flatten() - average(trained, target, MODELS)).norm()
        )


def test_a_snapshot_is_of_a_power_ema() -> None:
    averages = WeightAverages(nn.Linear(3, 2), EMA(0.9))
    averages.update()
    with pytest.raises(TypeError, match="the rule of 'average' is EMA"):
        Snapshot.of(averages)
