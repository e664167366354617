"""SWAG's samples against the Gaussian that they are to come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastswa import SWAG
from tests.models import train_step
from tests.swag import held, parameters, twelve, walked


def samples(swag: SWAG, count: int, **options: object) -> np.ndarray:
    """Samples of the followed model, one a row."""
    assert swag.module is not None
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(count):
        swag.sample_(generator=generator, **options)
        rows.append(parameters(swag.module))
    return np.stack(rows)


@pytest.mark.parametrize(("rank", "diagonal_only", "scale"), [(20, False, 1.0), (3, False, 0.25), (3, True, 1.0)])
def test_samples_have_the_mean_and_the_covariance_of_the_paper(rank: int, diagonal_only: bool, scale: float) -> None:
    steps, count = 7, 2000
    swag, models = walked(twelve(), steps, rank=rank)
    deviations = np.stack([models[index] - models[: index + 1].mean(0) for index in range(steps)])[-rank:]
    columns = min(rank, steps)
    covariance = np.diag(models.var(0))
    if not diagonal_only:
        covariance = covariance / 2 + deviations.T @ deviations / (2 * (columns - 1))
    covariance *= scale
    drawn = samples(swag, count, diagonal_only=diagonal_only, scale=scale)
    variance = np.diag(covariance)
    # Standard errors of a mean and of a covariance of normal numbers. 5 of them are passed once in 1.7 million times,
    # and there are 12 and 78; a covariance without its factors would be off by tens of them.
    mean_error = 5 * np.sqrt(variance / count)
    covariance_error = 5 * np.sqrt((np.outer(variance, variance) + covariance**2) / count)
    assert (np.abs(drawn.mean(0) - models.mean(0)) < mean_error).all()
    distance = drawn - models.mean(0)
    assert (np.abs(distance.T @ distance / count - covariance) < covariance_error).all()
    # The columns are seen at all: without them the covariances would be too small by this many standard errors.
    beside = np.abs(covariance - np.diag(variance)) / covariance_error
    assert diagonal_only or beside.max() > 2


def test_the_parts_of_a_sample() -> None:
    swag, models = walked(twelve(), 9, rank=4, dtype=torch.float64)
    model = swag.module

    def sample(**options: object) -> np.ndarray:
        other = twelve().double()
        swag.sample_(other, generator=torch.Generator().manual_seed(3), **options)
        return parameters(other) - models.mean(0)

    before = parameters(model)
    diagonal, full = sample(diagonal_only=True), sample()
    assert (parameters(model) == before).all()
    # One generator state gives one z_1 and one z_2, whatever the scale.
    assert np.allclose(sample(scale=9.0), 3 * full, rtol=0, atol=1e-14)
    assert np.allclose(sample(scale=9.0, diagonal_only=True), 3 * diagonal, rtol=0, atol=1e-14)
    assert np.allclose(sample(scale=0.0), 0, rtol=0, atol=1e-15)
    # Beside the diagonal part, with its 1/2, there is nothing but the columns of D.
    columns = np.stack([held(swag, "deviations", slot) for slot in range(4)], axis=1)
    rest = full - math.sqrt(1 / 2) * diagonal
    coefficients, *_ = np.linalg.lstsq(columns, rest, rcond=None)
    # float64 roundings of numbers below 1.
    assert np.allclose(columns @ coefficients, rest, rtol=0, atol=1e-13)
    assert (np.abs(coefficients * math.sqrt(2 * 3)) < 5).all()
    assert np.abs(rest).max() > 0.01


def test_the_generator_decides_and_goes_on() -> None:
    swag, _ = walked(twelve(), 5)

    def two(generator: torch.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for _ in range(2):
            swag.sample_(generator=generator)
            found.append(parameters(swag.module))
        return found[0], found[1]

    first, second = two(torch.Generator().manual_seed(1))
    assert (first != second).all()
    again = two(torch.Generator().manual_seed(1))
    assert (first == again[0]).all()
    assert (second == again[1]).all()
    assert (first != two(torch.Generator().manual_seed(2))[0]).all()
    # Without one, torch's own is drawn from.
    torch.manual_seed(1)
    assert (two(None)[1] == second).all()


def test_the_backends_draw_the_same_sample() -> None:
    drawn = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        swag, _ = walked(twelve(), 4, rank=3, backend=backend)
        drawn.append(samples(swag, 2))
    # A few float32 roundings of numbers below 4, in 4 updates and in the sample.
    assert np.allclose(drawn[0], drawn[1], rtol=0, atol=1e-5)


def test_one_model_or_one_column_is_refused() -> None:
    model = twelve()
    swag, narrow, diagonal = SWAG(model), SWAG(model, rank=1), SWAG(model, rank=0)
    before = parameters(model)
    with pytest.raises(RuntimeError, match="no model was collected"):
        swag.mean_()
    for models in range(2):
        assert f"{models} were collected" in swag.refusal()
        for refused in (swag.sample_, swag.sampled().__enter__, lambda: diagonal.sample_(diagonal_only=True)):
            with pytest.raises(RuntimeError, match=f"two models at least have a spread, and {models} were collected"):
                refused()
        assert (parameters(model) == before).all()
        for each in (swag, narrow, diagonal):
            each.collect()
    train_step(model)
    for each in (narrow, diagonal):
        each.collect()
        before = parameters(model)
        with pytest.raises(RuntimeError, match=rf"needs K >= 2 deviations, and rank={each.rank} keeps {each.columns}"):
            each.sample_()
        assert (parameters(model) == before).all()
        assert each.refusal(diagonal_only=True) is None
        each.sample_(diagonal_only=True)
        assert (parameters(model) != before).all()
    with pytest.raises(ValueError, match="scale must be at least 0 and finite, got -1"):
        diagonal.sample_(diagonal_only=True, scale=-1)
