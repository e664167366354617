"""The update in plain torch, over every way to cut tensors into gatherings and pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastswa import stretches, torch_lerp
from fastswa.flat import FlatBuffers
from fastswa.torch_multi_update import TorchMultiUpdate
from fastswa.torch_update import TorchUpdate
from fastswa_kernels import reference
from fastswa_kernels.rounding import StochasticRounding
from tests.numerics import assert_close_in_ulps, lerp_ulps


@contextmanager
def small_limits(limits: tuple[int, int, int], fused: int) -> Iterator[None]:
    """Limits at which small tensors meet every case: runs cut, gatherings cut, pieces cut, SGD's step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        patch.setattr(torch_lerp, "WORTH_A_THREAD", fused)
        patch.setattr(stretches, "SMALL", limits[0])
        patch.setattr(stretches, "GATHER", limits[1])
        patch.setattr(stretches, "GATHERED", limits[2])
        patch.setattr(stretches, "PIECE", {"cpu": limits[2]})
        yield


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    large=st.sampled_from([0, 50, 300]),
    average=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    source=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weight=st.sampled_from([0.0, 1e-3, 0.4, 0.8, 1.0]),
    limits=st.sampled_from([(8, 16, 64), (30, 33, 40), (1000, 2000, 3000)]),
    fused=st.sampled_from([0, 35, 10000]),
)
def test_gathering_and_converting_give_the_formula(
    sizes: list[int],
    large: int,
    average: torch.dtype,
    source: torch.dtype,
    weight: float,
    limits: tuple[int, int, int],
    fused: int,
) -> None:
    with small_limits(limits, fused):
        averages = [torch.randn(size).to(average) for size in [*sizes, large]]
        sources = [torch.randn(size).to(source) for size in [*sizes, large]]
        counters = [torch.zeros((), dtype=torch.int64) for _ in sizes]
        counted = [torch.tensor(index) for index, _ in enumerate(sizes)]
        flags, flagged = [torch.zeros(3, dtype=torch.bool)] * 1, [torch.tensor([True, False, True])]
        flat = FlatBuffers([*averages, *counters, *flags])
        before = [tensor.clone() for tensor in averages]
        update = TorchUpdate(averages, sources, [*counters, *flags], [*counted, *flagged], flat)
        with torch.no_grad():
            update.lerp_(weight)
    assert all(map(torch.equal, [*counters, *flags], [*counted, *flagged]))
    for result, old, new in zip(averages, before, sources, strict=True):
        wide = torch.float64 in (average, source)
        used = weight if wide else torch.tensor(weight).item()
        exact = old.double() + used * (new.double() - old.double())
        assert_close_in_ulps(result, exact, lerp_ulps(average), old, new)


def test_a_weight_on_the_device_takes_the_reference() -> None:
    averages, sources = [torch.zeros(4)], [torch.ones(4)]
    TorchUpdate(averages, sources, (), (), None).lerp_(torch.tensor(0.25))
    assert (averages[0] == 0.25).all()


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(), (0,), (5,), (40,), (7, 9), (3, 4, 5, 2)]), min_size=1, max_size=25),
    count=st.integers(1, 3),
    average=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    source=st.sampled_from([torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
    limits=st.sampled_from([(8, 16, 64), (30, 33, 100), (1000, 2000, 3000)]),
    fused=st.sampled_from([0, 35, 10000]),
    stochastic=st.booleans(),
)
def test_several_averages_give_what_each_alone_is_by_the_formula(
    shapes: list[tuple[int, ...]],
    count: int,
    average: torch.dtype,
    source: torch.dtype,
    channels_last: bool,
    limits: tuple[int, int, int],
    fused: int,
    stochastic: bool,
) -> None:
    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Where bits are compared, numbers with which all forms of the arithmetic are exact.
        values = (torch.randint(-256, 256, shape) / 64 if stochastic else torch.randn(shape)).to(dtype)
        return values.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else values

    weights = ([0.25, 1.0, 0.0] if stochastic else [0.3, 1.0, 0.0])[:count]
    sets = [[tensor(shape, average) for shape in shapes] for _ in range(count)]
    sources = [tensor(shape, source) for shape in shapes]
    before = [[each.clone() for each in own] for own in sets]
    random = (3, 5) if stochastic else None
    with small_limits(limits, fused):
        numbers = list(accumulate((each.numel() for each in sources), initial=0))[:-1]
        update = TorchMultiUpdate(sets, sources, (), (), [FlatBuffers(own) for own in sets], None, numbers)
        with torch.no_grad():
            update.lerp_(weights, random, None)
    for own, old, weight in zip(sets, before, weights, strict=True):
        for result, start, new in zip(own, old, sources, strict=True):
            wide = torch.float64 in (average, source)
            used = weight if wide else torch.tensor(weight).item()
            exact = start.double() + used * (new.double() - start.double())
            # Stochastically to either neighbour, so by up to a whole ulp.
            allowed = 1.01 if stochastic and average == torch.bfloat16 else lerp_ulps(average)
            assert_close_in_ulps(result, exact, allowed, start, new)
    if stochastic and average == torch.bfloat16:
        # Which neighbour it is depends on no cut: the specification, which cuts nothing, draws the same bits.
        reference.multi_lerp_(before, sources, weights, rounding=StochasticRounding(*random))
        assert all(torch.equal(*pair) for pairs in zip(sets, before, strict=True) for pair in zip(*pairs, strict=True))
