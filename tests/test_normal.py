"""Normal numbers that no generator draws: the specified ones, and normal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastswa_kernels import normal as normal_module
from fastswa_kernels.normal import normal
from tests.numerics import NORMAL_ERROR
from tests.test_rounding import specified_bits

CPU = torch.device("cpu")
COUNT = 1 << 17
# Five standard errors: a true statistic is missed once in 2 million trials, and the trials are fixed by their seeds.
ERRORS = 5


def specified(element: int, seed: int, step: int) -> float:
    """The formula of the module's head, from Python's integers to Python's floats."""
    radius, angle = (specified_bits(element, seed, step, number) for number in (2**32 - 1, 2**32 - 2))
    u, v = (radius % 2**31 + 0.5) / 2**31, angle / 2**32
    return math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)


@pytest.mark.parametrize("element", [0, 2**31 - 5, 2**32 - 5, 2**40 + 5])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-1, 3), (2**63 + 7, 2**35 + 3)])
def test_numbers_are_the_specified_ones(element: int, seed: int, step: int) -> None:
    z = normal(element, 10, seed, step, CPU)
    assert z.dtype == torch.float32
    exact = torch.tensor([specified(number, seed, step) for number in range(element, element + 10)])
    # Beside the errors of the functions, float32 rounds u and the angle: by 2^-25 of u, near 1 the whole of -ln u, and
    # by 2^-25 of half a turn.
    assert ((z - exact).abs() <= 1e-6 * exact.abs() + 2e-6).all()


def test_numbers_are_the_same_in_any_pieces_and_no_generator_is_touched() -> None:
    state = torch.get_rng_state()
    whole = normal(2**32 - 500, 1000, 1, 2, CPU)
    pieces = torch.cat([normal(2**32 - 500 + first, 125, 1, 2, CPU) for first in range(0, 1000, 125)])
    # torch computes the last elements of a tensor by other instructions.
    assert ((pieces - whole).abs() <= NORMAL_ERROR * whole.abs()).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert normal(5, 0, 1, 2, CPU).shape == (0,)


@pytest.mark.parametrize(
    ("radius", "angle", "expected"),
    [
        (0, 0, math.sqrt(64 * math.log(2))),
        (0, -(2**31), -math.sqrt(64 * math.log(2))),
        (-(2**31), 0, math.sqrt(64 * math.log(2))),
        (2**31 - 1, 0, 0.0),
        (0, 2**30, 0.0),
        (0, -(2**30), 0.0),
    ],
)
def test_extreme_words(radius: int, angle: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {normal_module.RADIUS: radius, normal_module.ANGLE: angle}
    made = lambda _, count, __, ___, number, ____: torch.full((count,), words[number], dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(normal_module, "random_bits", made)
    assert normal(0, 1, 0, 0, CPU).item() == pytest.approx(expected, rel=1e-6, abs=0)


STREAMS: dict[str, Callable[[int], Tensor]] = {
    "elements": lambda number: normal(number * COUNT, COUNT, 0, 0, CPU),
    "distant elements": lambda number: normal(number << 32, COUNT, 0, 0, CPU),
    "steps": lambda number: normal(0, COUNT, 0, number, CPU),
    "seeds": lambda number: normal(0, COUNT, number, 0, CPU),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_the_distribution_is_normal(stream: str) -> None:
    from scipy import stats

    z = torch.cat([STREAMS[stream](number) for number in (0, 1, 2, 3)]).double().numpy()
    n = len(z)
    # Standard errors of the moments of n normal numbers: the variances of z, z^2, z^3, z^4 are 1, 2, 15, 96.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < ERRORS * math.sqrt(variance / n)
    # Kolmogorov and Smirnov: sqrt(n) D passes 2.9 once in 10 million trials, 2 exp(-2 * 2.9^2).
    assert math.sqrt(n) * stats.kstest(z, "norm").statistic < 2.9
    for bound in (3.0, 4.0):
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(z) > bound).sum() - expected) < ERRORS * math.sqrt(expected)
    assert np.abs(z).max() < 6.67


@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_neighbours_are_independent(lag: int) -> None:
    z = normal(0, 4 * COUNT, 3, 4, CPU).double()
    independent(z[:-lag], z[lag:])


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_are_independent(stream: str) -> None:
    numbers = [STREAMS[stream](number).double() for number in (0, 1, 2, 256)]
    for first, second in itertools.combinations(numbers, 2):
        independent(first, second)


def independent(first: Tensor, second: Tensor) -> None:
    """Products of independent normal numbers have mean 0 and variance 1, of their squares less 1 variance 4."""
    n = len(first)
    assert abs((first * second).mean()) < ERRORS / math.sqrt(n)
    assert abs(((first**2 - 1) * (second**2 - 1)).mean()) < ERRORS * 2 / math.sqrt(n)
    # 8 x 8 cells of equal probability: chi-square with 63 degrees of freedom, mean 63 and variance 126; six of
    # its standard deviations are passed once in a million trials.
    cells = [((torch.erf(z / math.sqrt(2)) + 1) * 4).long().clamp(0, 7) for z in (first, second)]
    counts = torch.bincount(cells[0] * 8 + cells[1], minlength=64).double()
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi_square < 63 + 6 * math.sqrt(126)


def test_radius_and_angle_are_independent_though_one_hash_makes_both() -> None:
    words = [
        (normal_module.random_bits(0, 4 * COUNT, 5, 6, number, CPU).double() + 2**31) / 2**32
        for number in (normal_module.RADIUS, normal_module.ANGLE)
    ]
    cells = [(word * 16).long() for word in words]
    counts = torch.bincount(cells[0] * 16 + cells[1], minlength=256).double()
    expected = 4 * COUNT / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * math.sqrt(2 * 255)
