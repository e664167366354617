"""Several averages of each source in one launch, and stochastic rounding, against `reference.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastswa_kernels import LaunchConfig, MultiLerpTable, StochasticRounding, multi_lerp_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from fastswa_kernels.rounding import random_bits, round_stochastically
from tests.numerics import assert_close_in_ulps, lerp_ulps

Lists = list[list[Tensor]]
SIZES = (0, 1, 64, 2049, 3001)
# An idle average, both sides of the two-sided form, a copy.
WEIGHTS = (0.3, 0.0, 1e-3, 1.0, 0.5, 0.75, 0.9, 0.1, 0.6)
SHORT = [torch.bfloat16, torch.float16]
name = lambda value: str(value).removeprefix("torch.")  # noqa: E731


def lists(count: int, average: torch.dtype, source: torch.dtype, device: str, sizes: tuple[int, ...] = SIZES) -> Lists:
    """`count` lists of averages, then the sources."""
    dtypes = [average] * count + [source]
    return [[torch.randn(size, device=device).to(dtype) for size in sizes] for dtype in dtypes]


def copied(averages: Lists) -> Lists:
    return [[tensor.clone(memory_format=torch.preserve_format) for tensor in tensors] for tensors in averages]


def equal(first: Lists, second: Lists) -> bool:
    """Bit for bit: NaN equals itself, zeros of two signs differ."""
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def check(averages: Lists, sources: list[Tensor], weights: tuple[float, ...] | Tensor) -> None:
    """One nearest update against float64 arithmetic on the same weights."""
    before, exact = copied(averages), [[tensor.double() for tensor in tensors] for tensors in averages]
    for tensors in zip(*exact, sources, *averages, strict=True):
        wide = torch.float64 in (tensors[len(exact)].dtype, tensors[-1].dtype)
        used = torch.as_tensor(weights).to(torch.float64 if wide else torch.float32).double().to(tensors[0].device)
        reference.multi_lerp_([[target] for target in tensors[: len(exact)]], [tensors[len(exact)].double()], used)
    multi_lerp_(averages, sources, weights)
    for k, (tensors, targets, old) in enumerate(zip(averages, exact, before, strict=True)):
        for average, target, was, source in zip(tensors, targets, old, sources, strict=True):
            assert_close_in_ulps(average, target, lerp_ulps(average.dtype, kernel=True), was, source)
        assert weights[k] != 0 or equal([tensors], [old])


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_every_number_of_averages(count: int, kernel_device: str) -> None:
    *averages, sources = lists(count, torch.float32, torch.float32, kernel_device)
    check(averages, sources, WEIGHTS[:count])
    weights = torch.tensor(WEIGHTS[:count], device=kernel_device)
    check(averages, sources, weights)
    table = MultiLerpTable(averages, sources)
    assert table.launches == -(-count // 8)


@pytest.mark.parametrize(("average", "source"), [*itertools.product(FLOAT_DTYPES, FLOAT_DTYPES)], ids=name)
def test_every_pair_of_dtypes(average: torch.dtype, source: torch.dtype, kernel_device: str) -> None:
    *averages, sources = lists(2, average, source, kernel_device, (70, 2049))
    check(averages, sources, (1 / 3, 0.9))
    check(averages, sources, torch.tensor([1 / 3, 0.9], device=kernel_device, dtype=torch.float64))


def test_a_table_of_several_dtypes_with_copies_and_a_strided_tensor_of_weights(kernel_device: str) -> None:
    pairs = [(torch.float32, torch.bfloat16), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
    columns = [lists(3, average, source, kernel_device, (33,)) for average, source in pairs]
    averages, sources = [[column[k][0] for column in columns] for k in range(3)], [column[3][0] for column in columns]
    copy_from = [torch.arange(9001, device=kernel_device), torch.ones(3, dtype=torch.bool, device=kernel_device)]
    copy_to = [torch.zeros_like(tensor) for tensor in copy_from]
    table = MultiLerpTable(averages, sources, copy_to, copy_from)
    assert table.launches == 3
    expected = copied(averages)
    reference.multi_lerp_(expected, sources, [0.25, 0.0, 0.5])
    table.lerp_(torch.tensor([0.25, 9, 0.0, 9, 0.5, 9], device=kernel_device)[::2])
    for tensors, targets in zip(averages, expected, strict=True):
        for average, target in zip(tensors, targets, strict=True):
            assert_close_in_ulps(average, target.double(), 1.01 if average.dtype == torch.bfloat16 else 1.0, target)
    assert all(map(torch.equal, copy_to, copy_from))
    for tensor in copy_to:
        tensor.zero_()
    MultiLerpTable([[]] * 9, [], copy_to, copy_from).lerp_([0.0] * 9)
    assert all(map(torch.equal, copy_to, copy_from))


def test_odd_offsets_write_nothing_beside_them(kernel_device: str) -> None:
    base = torch.full((3, 3000), 7.0, device=kernel_device)
    averages = [[base[k, k : k + 2500]] for k in range(3)]
    for k, offset in enumerate((1, 0, 3)):
        averages[k][0].copy_(torch.randn(2500))
        source = torch.randn(3000, device=kernel_device)[offset : offset + 2500]
        check(averages, [source], (0.3, 0.6, 0.9))
    assert all((base[k, :k] == 7).all() and (base[k, k + 2500 :] == 7).all() for k in range(3))


@pytest.mark.parametrize("rounding", [None, StochasticRounding(1, 2)], ids=["nearest", "stochastic"])
def test_memory_formats(rounding: StochasticRounding | None, kernel_device: str) -> None:
    image = torch.randn(2, 4, 5, 3, device=kernel_device).bfloat16()
    formats = [image, image.to(memory_format=torch.channels_last), torch.randn(2, 4, 5, 6).to(image)[..., ::2]]
    for first, second, third in itertools.product(formats, formats, formats):
        averages, expected = [[[first.clone()], [second.clone()]] for _ in range(2)]
        if not (first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)):
            averages[0] = [torch.zeros(2, 4, 5, 6).to(image)[..., ::2].copy_(first)]
        source = [(third * 2).float()]
        # Numbers that bfloat16 holds, so that the interpreter's truncation can't differ.
        weights = [1.0, 1.0] if rounding is None else [0.3, 0.7]
        multi_lerp_(averages, source, weights, rounding=rounding)
        reference.multi_lerp_(expected, source, weights, rounding=rounding)
        assert equal(averages, expected)


def test_weight_zero_touches_nothing_and_weight_one_copies(kernel_device: str) -> None:
    nan = torch.full((100,), float("nan"), device=kernel_device)
    odd = torch.tensor([0x7F800001, -(1 << 31), 0x7FC01234, 0x3F800000], dtype=torch.int32, device=kernel_device)
    for implementation in (multi_lerp_, reference.multi_lerp_):
        for kind in (list, lambda weights: torch.tensor(weights, device=kernel_device)):
            idle, blended, copy = odd.repeat(25).view(torch.float32), nan.clone(), nan.clone()
            implementation([[idle], [blended]], [nan], kind([0.0, 0.5]))
            assert torch.equal(idle.view(torch.int32), odd.repeat(25))
            implementation([[idle], [copy]], [torch.ones_like(nan)], kind([0.0, 1.0]))
            assert torch.equal(idle.view(torch.int32), odd.repeat(25))
            assert blended.isnan().all()
            assert (copy == 1).all()


FLAGS = [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", FLAGS, ids=name)
def test_the_skip_flag(dtype: torch.dtype, kernel_device: str) -> None:
    *averages, sources = lists(2, torch.float32, torch.float32, kernel_device, (100,))
    copy_from = [torch.ones(100, device=kernel_device)]
    copy_to = [torch.zeros(100, device=kernel_device)]
    table = MultiLerpTable(averages, sources, copy_to, copy_from)
    before, flag = copied(averages), torch.zeros((), dtype=dtype, device=kernel_device)
    for value in (1, float("nan")) if dtype.is_floating_point else (1,):
        flag.fill_(value)
        table.lerp_([0.5, 1.0], skip=flag)
        reference.multi_lerp_(averages, sources, [0.5, 1.0], skip=flag.reshape(1, 1))
        assert equal([*averages, copy_to], [*before, [torch.zeros_like(copy_to[0])]])
    flag.zero_()
    reference.multi_lerp_(before, sources, [0.5, 1.0], skip=flag)
    table.lerp_([0.5, 1.0], skip=flag.reshape(1))
    assert torch.equal(averages[1][0], sources[0])
    assert_close_in_ulps(averages[0][0], before[0][0].double(), 1.0, sources[0])
    assert torch.equal(copy_to[0], copy_from[0])


@pytest.mark.parametrize("average", SHORT, ids=name)
@pytest.mark.parametrize(("source", "count"), [*zip(FLOAT_DTYPES, (1, 2, 3, 9), strict=True)], ids=name)
def test_stochastic_rounding_is_the_reference_bit_for_bit(
    average: torch.dtype, source: torch.dtype, count: int, kernel_device: str
) -> None:
    *averages, sources = lists(count, average, source, kernel_device, (5, 2049, 100))
    sources[2].mul_(1e-6)  # subnormal in float16, as are the averages beside it
    for tensors in averages:
        tensors[2].mul_(1e-6)
        tensors[0][:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(average).max])
    expected = copied(averages)
    for step in (2**33 + 1, torch.tensor(2**33 + 2, device=kernel_device)):
        rounding = StochasticRounding(seed=-3, step=step)
        multi_lerp_(averages, sources, WEIGHTS[:count], rounding=rounding)
        reference.multi_lerp_(expected, sources, WEIGHTS[:count], rounding=rounding)
        if kernel_device == "cpu":
            assert all(map(same_numbers, averages, expected))
        else:
            # A fused multiply-add may end on the other side of a neighbour: seldom, and by one step.
            for tensors, targets in zip(averages, expected, strict=True):
                assert (tensors[1] != targets[1]).double().mean() < 0.01


@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_nan_is_not_rounded_away(dtype: torch.dtype, kernel_device: str) -> None:
    # Payloads that would be cut off, or that the random bits would carry into the sign.
    words = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -(1 << 23) + 1], dtype=torch.int32, device=kernel_device)
    averages = [[torch.zeros(400, device=kernel_device).to(dtype)] for _ in range(2)]
    nan = words.repeat(100).view(torch.float32)
    multi_lerp_(averages, [nan], [1.0, 0.5], rounding=StochasticRounding(1, 2))
    assert averages[0][0].isnan().all()
    assert averages[1][0].isnan().all()


def same_numbers(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit for bit, but for the payload of a NaN."""
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs) and equal(
        [[a.where(~a.isnan(), 0) for a in first]], [[b.where(~b.isnan(), 0) for b in second]]
    )


def test_stochastic_rounding_leaves_wide_averages_alone(kernel_device: str) -> None:
    *averages, sources = lists(2, torch.float32, torch.float32, kernel_device, (100,))
    plain = copied(averages)
    multi_lerp_(averages, sources, [0.3, 0.6], rounding=StochasticRounding(1, 2))
    multi_lerp_(plain, sources, [0.3, 0.6])
    assert equal(averages, plain)


@pytest.mark.parametrize("dtype", SHORT, ids=name)
def test_no_launch_configuration_changes_a_bit(dtype: torch.dtype, kernel_device: str) -> None:
    *averages, sources = lists(2, dtype, torch.float32, kernel_device, (9000, 3))
    results = []
    for config in (None, LaunchConfig(4096, 512, 8), LaunchConfig(1024, 256, 2), LaunchConfig.for_elements(1 << 27)):
        results.append(copied(averages))
        MultiLerpTable(results[-1], sources, config=config).lerp_([0.3, 0.6], StochasticRounding(1, 2))
    assert all(equal(result, results[0]) for result in results)


def test_elements_are_numbered_through_the_list(kernel_device: str) -> None:
    average, source = torch.zeros(3000, device=kernel_device), torch.rand(3000, device=kernel_device)

    def updated(*cuts: int, before: torch.dtype | None = None) -> Tensor:
        """The average, cut into several tensors; after another of 7 elements and of some dtype."""
        result = average.bfloat16()
        averages, sources = list(result.tensor_split(cuts)), list(source.tensor_split(cuts))
        if before is not None:
            averages.insert(0, torch.zeros(7, dtype=before, device=kernel_device))
            sources.insert(0, torch.ones(7, device=kernel_device))
        multi_lerp_([averages], sources, [0.3], rounding=StochasticRounding(1, 2))
        return result

    assert torch.equal(updated(), updated(5, 1001))
    shifted = updated(before=torch.bfloat16)
    assert torch.equal(shifted, updated(1001, before=torch.float32))
    assert not torch.equal(shifted, updated())
    # Element numbers beyond 2^32, which no test has the memory to reach otherwise.
    table = MultiLerpTable([[first := average.bfloat16()]], [source], first_elements=[2**32 - 1000])
    table.lerp_([0.3], StochasticRounding(1, 2))
    numbers = 2**32 - 1000, 3000, 1, 2, 0, torch.device(kernel_device)
    assert torch.equal(first, round_stochastically(source * 0.3, torch.bfloat16, random_bits(*numbers)))


def test_averages_steps_and_seeds_round_independently(kernel_device: str) -> None:
    source = torch.full((4000,), 1 + 2**-8, device=kernel_device)  # halfway between two numbers of bfloat16
    results = []
    for rounding in (StochasticRounding(1, 2), StochasticRounding(1, 3), StochasticRounding(2, 2)):
        averages = [[torch.zeros(4000, device=kernel_device).bfloat16()] for _ in range(2)]
        multi_lerp_(averages, [source], [1.0, 1.0], rounding=rounding)
        results += [tensors[0] > 1 for tensors in averages]
    for first, second in itertools.combinations(results, 2):
        # Fair coins agree half of the time; 5 standard errors of 4000.
        assert abs((first == second).double().mean() - 0.5) < 5 * 0.5 / 4000**0.5


def test_an_average_in_bfloat16_follows_a_drift_that_nearest_rounding_never_sees() -> None:
    # A step of bfloat16 at 1 is 2^-7; an update moves by 1e-4 or less, 1 % of it. Each of the 2000 updates adds a
    # rounding error of variance at most 0.013 * (2^-7)^2, together a standard deviation of 0.04 or 20 % of the distance
    # for one element, and 0.2 % for the mean of 10000: 2 % is ten of those.
    drifting, stochastic, nearest = torch.ones(10000), torch.ones(10000).bfloat16(), torch.ones(10000).bfloat16()
    exact = torch.ones((), dtype=torch.float64)
    for step in range(2000):
        drifting.fill_(1.5 + step / 2000)
        reference.multi_lerp_([[stochastic]], [drifting], [1e-4], rounding=StochasticRounding(5, step))
        reference.multi_lerp_([[nearest]], [drifting], [1e-4])
        exact += 1e-4 * (drifting[0].double() - exact)
    moved = exact - 1
    assert moved > 0.15
    assert abs(stochastic.double().mean() - exact) < 0.02 * moved
    assert (nearest == 1).all()


@pytest.mark.gpu
def test_a_captured_graph_follows_weights_step_and_flag() -> None:
    averages, source = [[torch.zeros(5000, device="cuda").bfloat16()] for _ in range(2)], torch.rand(5000).cuda()
    weights, step = torch.tensor([0.3, 0.0], device="cuda"), torch.tensor(0, device="cuda")
    skip = torch.tensor(False, device="cuda")
    table = MultiLerpTable(averages, [source])
    table.lerp_(weights, StochasticRounding(1, step), skip)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.lerp_(weights, StochasticRounding(1, step), skip)
    for number, values, skipped in ((1, [0.3, 0.0], False), (2, [0.0, 0.6], False), (3, [1.0, 1.0], True)):
        weights.copy_(torch.tensor(values))
        step.fill_(number)
        skip.fill_(skipped)
        expected = copied(averages)
        MultiLerpTable(expected, [source]).lerp_([0.0, 0.0] if skipped else values, StochasticRounding(1, number))
        graph.replay()
        assert equal(averages, expected)


@pytest.mark.parametrize("implementation", [multi_lerp_, reference.multi_lerp_], ids=["kernel", "reference"])
def test_a_tied_weight_is_updated_once(implementation: Callable[..., None]) -> None:
    averages, source = [torch.zeros(9), torch.zeros(9)], torch.ones(9)
    implementation([[average, average] for average in averages], [source, source], [0.25, 0.5])
    assert (averages[0] == 0.25).all()
    assert (averages[1] == 0.5).all()
