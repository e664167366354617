"""The kernels against `reference.py` run in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import fastswa_kernels
from fastswa_kernels import LaunchConfig, LerpTable, lerp_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES, dense_view, same_layout
from fastswa_kernels.table import _rows
from tests.numerics import assert_close_in_ulps, lerp_ulps

# Around the vector width, around the chunk, and odd tails; the interpreter does about 5 M elements a second.
SIZES = (0, 1, 3, 64, 2047, 2048, 2049, 5000)
# Both sides of the two-sided form, and both ends.
WEIGHTS = (0.0, 1e-3, 0.3, 0.5, 0.75, 1.0)
PAIRS = list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES))


def exact_lerp(averages: list[Tensor], sources: list[Tensor], weight: float) -> list[Tensor]:
    exact = [average.double() for average in averages]
    for average, source, target in zip(averages, sources, exact, strict=True):
        wide = torch.float64 in (average.dtype, source.dtype)
        used = torch.tensor(weight, dtype=torch.float64 if wide else torch.float32).double()
        reference.lerp_([target], [source.double()], used.to(target.device))
    return exact


def check(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    exact = exact_lerp(averages, sources, weight)
    before = [average.clone() for average in averages]
    lerp_(averages, sources, weight)
    for average, target, old, source in zip(averages, exact, before, sources, strict=True):
        assert_close_in_ulps(average, target, lerp_ulps(average.dtype, kernel=True), old, source)


@pytest.mark.parametrize(("average", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_pair_of_dtypes(average: torch.dtype, source: torch.dtype, kernel_device: str) -> None:
    for weight in WEIGHTS:
        averages = [torch.randn(size, device=kernel_device).to(average) for size in SIZES]
        sources = [torch.randn(size, device=kernel_device).to(source) for size in SIZES]
        check(averages, sources, weight)


@pytest.mark.parametrize(("average", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_reference_against_rational_arithmetic(average: torch.dtype, source: torch.dtype) -> None:
    a, p = torch.randn(50).to(average), torch.randn(50).to(source)
    for weight in (0.25, 1 / 3, 0.9):
        result = a.clone()
        reference.lerp_([result], [p], weight)
        compute = torch.float64 if torch.float64 in (average, source) else torch.float32
        w = Fraction(torch.tensor(weight, dtype=compute).item())
        exact = [
            float(Fraction(old) + w * (Fraction(new) - Fraction(old)))
            for old, new in zip(a.tolist(), p.tolist(), strict=True)
        ]
        assert_close_in_ulps(result, torch.tensor(exact, dtype=torch.float64), lerp_ulps(average), a, p)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_slices_at_odd_offsets_write_nothing_beside_them(offset: int, dtype: torch.dtype, kernel_device: str) -> None:
    base = torch.full((6000,), 7.0, device=kernel_device)
    average = base[offset : offset + 4100]
    average.copy_(torch.randn(4100))
    source = torch.randn(4200, device=kernel_device).to(dtype)[offset : offset + 4100]
    check([average], [source], 0.3)
    assert (base[:offset] == 7).all()
    assert (base[offset + 4100 :] == 7).all()


def test_memory_formats(kernel_device: str) -> None:
    image = torch.randn(4, 8, 5, 5, device=kernel_device)
    formats = [image, image.to(memory_format=torch.channels_last), image.transpose(1, 3)]
    for average, source in itertools.product(formats, formats):
        if average.shape == source.shape:
            strides = average.stride()
            copy = torch.empty_like(average).copy_(average)
            check([copy], [source * 2], 0.3)
            assert copy.stride() == strides
    # Gaps between the elements, on either side.
    wide = torch.randn(40, 20, device=kernel_device)
    check([wide[:, ::2]], [torch.randn(40, 10, device=kernel_device)], 0.3)
    check([torch.randn(40, 10, device=kernel_device)], [wide[:, ::2]], 0.3)


def test_weight_one_replaces_nan_and_infinity(kernel_device: str) -> None:
    for dtype in FLOAT_DTYPES:
        average = torch.full((100,), float("nan"), dtype=dtype, device=kernel_device)
        average[1::2] = float("inf")
        source = torch.randn(100, device=kernel_device).to(dtype)
        lerp_([average], [source], 1.0)
        assert torch.equal(average, source)


def test_weight_zero_keeps_numbers_and_shows_nan(kernel_device: str) -> None:
    # Unlike multi_lerp_, which leaves an average of weight 0 alone: a model that has diverged is to be seen here.
    source = torch.tensor([1.0, float("nan")], device=kernel_device)
    for implementation in (lerp_, reference.lerp_):
        average = torch.tensor([3.0, 3.0], device=kernel_device)
        implementation([average], [source], 0.0)
        assert average[0] == 3
        assert average[1].isnan()


def test_weight_as_a_device_tensor(kernel_device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        weight = torch.tensor(1 / 3, dtype=torch.float64, device=kernel_device)
        averages = [torch.randn(3000, device=kernel_device, dtype=dtype)]
        sources = [torch.randn(3000, device=kernel_device, dtype=dtype)]
        exact = exact_lerp(averages, sources, 1 / 3)
        before = averages[0].clone()
        lerp_(averages, sources, weight)
        assert_close_in_ulps(averages[0], exact[0], lerp_ulps(dtype), before, sources[0])


def test_a_pair_listed_twice_is_updated_once(kernel_device: str) -> None:
    average, source = torch.zeros(100, device=kernel_device), torch.ones(100, device=kernel_device)
    lerp_([average, average], [source, source], 0.25)
    assert (average == 0.25).all()
    average.zero_()
    reference.lerp_([average, average], [source, source], 0.25)
    assert (average == 0.25).all()


def test_a_table_serves_several_dtypes_and_copies_in_few_launches(kernel_device: str) -> None:
    averages = [torch.randn(100, device=kernel_device), torch.randn(7, device=kernel_device).bfloat16()]
    sources = [torch.randn(100, device=kernel_device), torch.randn(7, device=kernel_device).bfloat16()]
    kinds = (torch.int64, torch.bool, torch.uint8, torch.float16, torch.complex64)
    copy_from = [torch.randint(0, 2, (n,), device=kernel_device).to(kind) for kind in kinds for n in (1, 37, 9000)]
    copy_to = [torch.zeros_like(tensor) for tensor in copy_from]
    table = LerpTable(averages, sources, copy_to, copy_from)
    assert table.launches == 2
    exact = exact_lerp(averages, sources, 0.3)
    before = [average.clone() for average in averages]
    table.lerp_(0.3)
    for average, target, old, source in zip(averages, exact, before, sources, strict=True):
        assert_close_in_ulps(average, target, lerp_ulps(average.dtype, kernel=True), old, source)
    assert all(map(torch.equal, copy_to, copy_from))


def test_copies_alone_need_no_average(kernel_device: str) -> None:
    source = torch.arange(9001, device=kernel_device)
    target = torch.zeros_like(source)
    LerpTable([], [], [target], [source]).lerp_(0.5)
    assert torch.equal(target, source)


def test_launch_config_changes_nothing_but_the_launch(kernel_device: str) -> None:
    average = torch.randn(9000, device=kernel_device)
    source = torch.randn(9000, device=kernel_device)
    results = []
    for config in (
        LaunchConfig(),
        LaunchConfig(chunk=4096, block=512, num_warps=8),
        LaunchConfig.for_elements(1 << 27),
    ):
        copy = average.clone()
        LerpTable([copy], [source], config=config).lerp_(0.3)
        results.append(copy)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_cover_more_than_two_to_the_31_elements() -> None:
    # Meta tensors have sizes and no memory: the arithmetic of the table without 24 GB.
    sizes = ((1 << 31) + 5, 3, 0, (1 << 32) + 1)
    tensors = [torch.empty(size, device="meta") for size in sizes]
    rows = _rows([tensors], tensors, [0] * 4, 16384, in_bytes=False)
    assert rows[:, 1].sum() == sum(sizes)
    assert rows[:, 1].min() > 0
    first = rows[: -(-sizes[0] // 16384)]
    assert first[-1, 0] == (len(first) - 1) * 16384 * 4
    assert first[-1, 1] == 5


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_in_one_tensor() -> None:
    average = torch.zeros((1 << 31) + 12345, device="cuda", dtype=torch.bfloat16)
    source = torch.ones_like(average)
    lerp_([average], [source], 0.25)
    assert bool((average == 0.25).all())


@pytest.mark.gpu
def test_a_captured_graph_follows_the_weight() -> None:
    average, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    weight = torch.tensor(0.5, device="cuda")
    table = LerpTable([average], [source])
    table.lerp_(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.lerp_(weight)
    average.zero_()
    for value in (0.5, 0.25):
        weight.fill_(value)
        graph.replay()
    assert bool((average == 0.625).all())


@pytest.mark.gpu
def test_equal_to_foreach_lerp_within_an_ulp() -> None:
    averages = [torch.randn(size, device="cuda") for size in SIZES]
    sources = [torch.randn(size, device="cuda") for size in SIZES]
    theirs = [average.clone() for average in averages]
    before = [average.clone() for average in averages]
    torch._foreach_lerp_(theirs, sources, 0.3)
    lerp_(averages, sources, 0.3)
    for ours, other, old, source in zip(averages, theirs, before, sources, strict=True):
        assert_close_in_ulps(ours, other, 1.0, old, source)


def test_dense_view_and_same_layout() -> None:
    weight = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    view = dense_view(weight)
    assert view is not None
    assert view.data_ptr() == weight.data_ptr()
    assert sorted(view.tolist()) == list(range(24))
    assert dense_view(torch.zeros(4, 4)[:, ::2]) is None
    assert dense_view(torch.zeros(1).expand(5)) is None
    assert same_layout(torch.zeros(1, 5), torch.zeros(5, 1).t())
    assert not same_layout(torch.zeros(2, 3), torch.zeros(3, 2).t())


def test_the_table_of_recent_lists_is_found_again_and_not_confused(kernel_device: str) -> None:
    from fastswa_kernels.average_plan import _recent

    memory = torch.zeros(100, device=kernel_device)
    source = torch.ones(100, device=kernel_device)
    _recent.clear()
    for _ in range(3):
        lerp_([memory[:50]], [source[:50]], 0.5)
    assert len(_recent) == 1
    lerp_([memory[:20]], [source[:20]], 0.5)  # the same address, fewer elements
    assert len(_recent) == 2
    assert memory[0] == 0.9375
    assert memory[30] == 0.875
    for size in range(1, 20):
        lerp_([memory[:size]], [source[:size]], 0.5)
    assert len(_recent) == 8


def test_public_names_are_importable() -> None:
    for name in fastswa_kernels.__all__:
        assert getattr(fastswa_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastswa_kernels.nothing
