"""What the tests of weighted sums share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastswa import backends
from fastswa_kernels import combine_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.numerics import assert_weighted_sum

Combine = Callable[[list[Tensor], list[list[Tensor]], Any], None]

COEFFICIENTS = (1 / 3, -0.7, 1e-3, 1.0, 0.0, 2.5, -1.0, 0.1, -1e-5)
PAIRS = list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES))
IMPLEMENTATIONS = [
    pytest.param(reference.combine_, "cpu", id="reference"),
    pytest.param(backends.combine_, "cpu", id="torch"),
    pytest.param(combine_, "cpu", id="kernel"),
    pytest.param(combine_, "cuda", id="kernel-cuda", marks=pytest.mark.gpu),
]


def name(value: object) -> str:
    """Of a dtype, in a test's id."""
    return str(value).removeprefix("torch.")


def rows(
    count: int, target: torch.dtype, source: torch.dtype, device: str, sizes: tuple[int, ...]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Targets that hold NaN, and `count` lists of sources."""
    targets = [torch.full((size,), float("nan"), dtype=target, device=device) for size in sizes]
    return targets, [[torch.randn(size, device=device).to(source) for size in sizes] for _ in range(count)]


def check(implementation: Combine, targets: list[Tensor], sources: list[list[Tensor]], coefficients: Any) -> None:
    """One combination against the reference's into float64, which is tested against rational arithmetic."""
    values = [float(value) for value in coefficients]
    exact, size = ([torch.empty_like(target, dtype=torch.float64) for target in targets] for _ in range(2))
    reference.combine_(exact, sources, values)
    reference.combine_(size, [[tensor.abs() for tensor in tensors] for tensors in sources], list(map(abs, values)))
    implementation(targets, sources, coefficients)
    for target, result, scale in zip(targets, exact, size, strict=True):
        assert_weighted_sum(target, result, scale, len(values), kernel=implementation is combine_)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of a dtype and shape hold the same bits: zeros of two signs differ."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
