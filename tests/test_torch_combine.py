"""Weighted sums in plain torch, over every way to cut tensors into groups and pieces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastswa import backends, torch_combine
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.combine import COEFFICIENTS, PAIRS, check, name, rows


@pytest.mark.parametrize(("target", "source"), PAIRS, ids=name)
def test_plain_torch_on_every_pair_of_dtypes(target: torch.dtype, source: torch.dtype) -> None:
    check(backends.combine_, *rows(3, target, source, "cpu", (0, 1, 70, 8193, 20000)), COEFFICIENTS[:3])


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4), min_size=1, max_size=12),
    count=st.integers(1, 9),
    dtypes=st.lists(st.tuples(st.sampled_from(FLOAT_DTYPES), st.sampled_from(FLOAT_DTYPES)), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(["dense", "transposed", "gaps"]), min_size=1, max_size=7),
    limits=st.sampled_from([(8, 16, 20), (30, 33, 40), (1000, 2000, 3000)]),
)
def test_plain_torch_on_any_shape(
    shapes: list[list[int]],
    count: int,
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    layouts: list[str],
    limits: tuple[int, int, int],
) -> None:
    kinds, dtype = itertools.cycle(layouts), itertools.cycle(dtypes)

    def tensor(shape: list[int], dtype: torch.dtype) -> Tensor:
        layout = next(kinds)
        if layout == "transposed":
            return torch.randn(shape[::-1]).to(dtype).permute(list(range(len(shape)))[::-1])
        return torch.randn(*shape, 2).to(dtype)[..., 0] if layout == "gaps" else torch.randn(shape).to(dtype)

    pairs = [(shape, *next(dtype)) for shape in shapes]
    targets = [tensor(shape, target) for shape, target, _ in pairs]
    sources = [[tensor(shape, source) for shape, _, source in pairs] for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        # Small limits, so that small tensors meet every case: groups cut, pieces cut, dimensions cut one after another.
        for limit, value in zip(("SMALL", "GATHER", "PIECE"), limits, strict=True):
            patch.setattr(torch_combine, limit, value)
        check(backends.combine_, targets, sources, COEFFICIENTS[:count])


def test_plain_torch_makes_no_large_temporary() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return result

    plain, odd = torch.randn(300, 2000), torch.randn(2000, 300).t()
    small = [torch.randn(100) for _ in range(600)]
    targets, sources = [plain, odd, *small], [[odd.clone(), plain.clone(), *map(torch.clone, small)] for _ in range(2)]
    given = {tensor.untyped_storage().data_ptr() for tensors in (targets, *sources) for tensor in tensors}
    with Largest() as largest:
        backends.combine_(targets, sources, [0.5, 0.25])
    assert 0 < largest.bytes <= 2 * 8 * torch_combine.PIECE
    assert plain.nbytes * 2 > 2 * 8 * torch_combine.PIECE  # what a float64 copy would have taken
