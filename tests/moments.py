"""What the tests of running moments share: every implementation, lists of tensors, the formulas in wide numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fastswa import backends
from fastswa_kernels import moments_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.numerics import assert_close_in_ulps, moments_ulps

Tensors = list[Tensor]
Moments = Callable[..., None]
# Around the vector width, both branches' blocks, the chunk; odd tails.
SIZES = (0, 1, 5, 511, 512, 513, 1023, 1025, 2049, 3001)
PAIRS = [*itertools.product(FLOAT_DTYPES, FLOAT_DTYPES)]
name = lambda value: str(value).removeprefix("torch.")  # noqa: E731


def torch_moments_(
    means: Tensors, variances: Tensors, sources: Tensors, weight: float, deviations: Tensors | None = None
) -> None:
    """The path of the CPU, through the choice of backends."""
    ring = [] if deviations is None else [deviations]
    update = backends.prepare_moments(means, variances, ring, sources, backend="torch")
    update.update_(weight, None if deviations is None else 0)


IMPLEMENTATIONS = {"kernel": moments_, "torch": torch_moments_, "reference": reference.moments_}
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


def moments_of(moment: torch.dtype, source: torch.dtype, device: str, sizes: Sequence[int] = SIZES) -> list[Tensors]:
    """Means, variances, sources, deviations; variances are not negative."""
    lists = [[torch.randn(size, device=device) for size in sizes] for _ in range(4)]
    dtypes = moment, moment, source, moment
    lists[1] = [variance.abs() for variance in lists[1]]
    return [[tensor.to(dtype) for tensor in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]


def exact(mean: Tensor, variance: Tensor, source: Tensor, weight: float, compute: torch.dtype) -> list[Tensor]:
    """The moments' formulas as they are written, in the widest numbers that numpy has, rounded to float64."""
    m, v, p = (np.asarray(tensor.double().cpu().numpy(), dtype=np.longdouble) for tensor in (mean, variance, source))
    # The weight counts as the arithmetic holds it.
    w = np.longdouble(torch.tensor(weight, dtype=compute).item())
    # The deviation p - (m + w (p - m)) in the one form that loses nothing of a small one to the mean's rounding.
    results = m + w * (p - m), (1 - w) * (v + w * (p - m) ** 2), (1 - w) * (p - m)
    return [torch.from_numpy(np.asarray(result, dtype=np.float64)).to(mean.device) for result in results]


def check(implementation: Moments, lists: list[Tensors], weight: float, with_deviations: bool = True) -> None:
    """One update against extended precision."""
    means, variances, sources, deviations = lists
    expected, operands = [], [tensor.clone() for tensor in means]
    for mean, variance, source in zip(means, variances, sources, strict=True):
        compute = torch.float64 if torch.float64 in (mean.dtype, source.dtype) else torch.float32
        wider = mean.dtype != compute
        expected.append((exact(mean, variance, source, weight, compute), wider))
    before = [tensor.clone() for tensor in deviations]
    implementation(means, variances, sources, weight, *([deviations] if with_deviations else []))
    for index, (results, wider) in enumerate(expected):
        mean, variance, deviation = (tensors[index] for tensors in (means, variances, deviations))
        bounds = moments_ulps(mean.dtype, wider, implementation is moments_)
        assert_close_in_ulps(mean, results[0], bounds[0], operands[index], sources[index])
        assert_close_in_ulps(variance, results[1], bounds[1])
        if with_deviations:
            assert_close_in_ulps(deviation, results[2], bounds[2])
        else:
            assert torch.equal(deviation, before[index])
