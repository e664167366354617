"""Running means, variances and deviations: kernel, plain torch and reference against extended precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastswa import backends, torch_moments
from fastswa_kernels import LaunchConfig, MomentsTable, moments_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.numerics import assert_close_in_ulps, moments_ulps

Tensors = list[Tensor]
Moments = Callable[..., None]
# Around the vector width, both branches' blocks, the chunk; odd tails.
SIZES = (0, 1, 5, 511, 512, 513, 1023, 1025, 2049, 3001)
# Both sides of the two-sided form, and what needs a select.
WEIGHTS = (0.3, 0.5, 1 / 3, 1e-3, 0.75, 1.0, 0.0)
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


@every
@pytest.mark.parametrize(("moment", "source"), PAIRS, ids=name)
def test_every_pair_of_dtypes(
    implementation: Moments, moment: torch.dtype, source: torch.dtype, kernel_device: str
) -> None:
    lists = moments_of(moment, source, kernel_device, (5, 2049))
    check(implementation, lists, 1 / 3)
    check(implementation, lists, 0.75)


@every
@pytest.mark.parametrize("weight", WEIGHTS)
def test_edge_sizes_and_weights(implementation: Moments, weight: float, kernel_device: str) -> None:
    lists = moments_of(torch.float32, torch.float32, kernel_device)
    check(implementation, lists, weight)
    check(implementation, lists, weight, with_deviations=False)
    implementation([], [], [], weight)


@every
@pytest.mark.parametrize("moment", FLOAT_DTYPES, ids=name)
def test_the_first_model_needs_no_memory_that_was_written(
    implementation: Moments, moment: torch.dtype, kernel_device: str
) -> None:
    source = torch.randn(3000, device=kernel_device).to(moment)
    mean, variance, deviation = [[torch.full_like(source, torch.nan)] for _ in range(3)]
    implementation(mean, variance, [source], 1.0, deviation)
    assert torch.equal(mean[0], source)
    assert (variance[0] == 0).all()
    assert (deviation[0] == 0).all()
    # Weights that are not finite are not hidden.
    source[7] = torch.nan
    implementation(mean, variance, [source], 0.5, deviation)
    for tensors in (mean, variance, deviation):
        assert tensors[0][7].isnan()
        assert tensors[0].isnan().sum() == 1


@pytest.mark.parametrize("implementation", [moments_, reference.moments_], ids=["kernel", "reference"])
def test_a_weight_in_a_tensor(implementation: Moments, kernel_device: str) -> None:
    for moment, form in itertools.product((torch.float32, torch.float64), (torch.float32, torch.float64)):
        lists = moments_of(moment, moment, kernel_device, (2049,))
        if form == torch.float64 or moment == torch.float32:
            weight = torch.tensor(1 / 3, dtype=form, device=kernel_device)
            check(lambda m, v, p, w, d, given=weight: implementation(m, v, p, given, d), lists, 1 / 3)


@every
def test_200_models_have_the_mean_and_variance_that_numpy_finds(implementation: Moments) -> None:
    # The mean's rounding errors, half an ulp (6e-8) for each of 200 updates with random signs, shrink with the later
    # weights: 6e-8 * sqrt(200 / 3) = 5e-7 remain, 0.5 % of the standard deviation; 2 % of the variance is twice that,
    # twice because of the square.
    models = 1 + 1e-4 * torch.randn(200, 300)
    mean, variance, deviation = [[torch.full((300,), torch.nan)] for _ in range(3)]
    squares, plain = torch.zeros(300), torch.zeros(300)
    for n, model in enumerate(models, 1):
        implementation(mean, variance, [model], 1 / n, deviation)
        squares.lerp_(model * model, 1 / n)
        plain.lerp_(model, 1 / n)
    true = models.double().numpy()
    assert np.abs(mean[0].numpy() - true.mean(0)).max() < 5e-6
    assert np.abs(variance[0].numpy() / true.var(0) - 1).max() < 0.02
    assert np.abs(deviation[0].numpy() - (true[-1] - true.mean(0))).max() < 5e-6
    # What the docstring says of the other way: it is off by many times the variance itself.
    assert (((squares - plain * plain).numpy() / true.var(0) - 1) ** 2).mean() ** 0.5 > 20


def test_a_constant_weight_gives_the_exponential_moments() -> None:
    models, w = torch.randn(50, 20, dtype=torch.float64), 0.1
    mean, variance = [torch.empty(20, dtype=torch.float64)], [torch.empty(20, dtype=torch.float64)]
    for n, model in enumerate(models):
        reference.moments_(mean, variance, [model], w if n else 1.0)
    shares = w * (1 - w) ** np.arange(49, -1, -1.0)
    shares[0] = (1 - w) ** 49
    true = models.numpy()
    average = shares @ true
    assert np.abs(mean[0].numpy() - average).max() < 1e-14
    assert np.abs(variance[0].numpy() - shares @ (true - average) ** 2).max() < 1e-14


@every
def test_odd_offsets_write_nothing_beside_them(implementation: Moments, kernel_device: str) -> None:
    for offsets in ((1, 1, 1, 1), (0, 0, 0, 2), (0, 3, 0, 0), (1, 0, 2, 3), (4, 8, 12, 16)):
        base = torch.full((4, 4000), 7.0, device=kernel_device)
        lists = [[base[k, offset : offset + 2500]] for k, offset in enumerate(offsets)]
        for tensors in lists:
            tensors[0].copy_(torch.rand(2500))
        check(implementation, lists, 0.3)
        for k, offset in enumerate(offsets):
            assert (base[k, :offset] == 7).all()
            assert (base[k, offset + 2500 :] == 7).all()


@every
def test_memory_formats(implementation: Moments, kernel_device: str) -> None:
    wide = torch.rand(2, 4, 5, 6, device=kernel_device)
    formats = [wide[..., :3].contiguous(), wide[..., :3].contiguous(memory_format=torch.channels_last), wide[..., ::2]]
    for layouts in itertools.product(formats, repeat=4):
        lists = [[wide.clone()[..., ::2] if tensor is formats[2] else tensor.clone()] for tensor in layouts]
        check(implementation, lists, 0.3)


@every
def test_a_tied_weight_is_taken_once(implementation: Moments) -> None:
    (m, n), (v, w), (p, q), (d, e) = (list(torch.rand(4, 2, 9)[k].unbind()) for k in range(4))
    expected = [tensor.clone() for tensor in (m, n, v, w, d, e)]
    reference.moments_(expected[:2], expected[2:4], [p, q], 0.25, expected[4:])
    implementation([m, n, m], [v, w, v], [p, q, p], 0.25, [d, e, d])
    for tensor, target in zip((m, n, v, w, d, e), expected, strict=True):
        torch.testing.assert_close(tensor, target, rtol=1e-6, atol=0)


def test_a_ring_of_slots(kernel_device: str) -> None:
    dtypes = [(torch.float32, torch.bfloat16), (torch.float64, torch.float64), (torch.float32, torch.float32)]
    columns = [moments_of(*pair, kernel_device, (33, 2049)) for pair in dtypes]
    means, variances, sources, _ = ([tensor for column in columns for tensor in column[k]] for k in range(4))
    rings = [[[torch.full_like(mean, torch.nan) for mean in means] for _ in range(3)] for _ in range(3)]
    own = [[tensor.clone() for tensor in tensors] for tensors in (means, variances)]
    table = MomentsTable(*own, sources, rings[0])
    assert table.launches == 3
    prepared = backends.prepare_moments(means, variances, rings[1], sources, backend="torch")
    for n, slot in enumerate((2, 0, None, 2), 2):
        for source in sources:
            source.normal_()
        deviations = None if slot is None else rings[2][slot]
        reference.moments_(*([t.clone() for t in tensors] for tensors in own), sources, 1 / n, deviations)
        table.moments_(1 / n, slot)
        prepared.update_(1 / n, slot)
        for ring in rings[:2]:
            for tensors, targets in zip(ring, rings[2], strict=True):
                for tensor, target in zip(tensors, targets, strict=True):
                    # Both means have moved on by their own roundings, three at most.
                    torch.testing.assert_close(tensor, target, rtol=0, atol=2e-6, equal_nan=True)
    assert all(tensor.isnan().all() for ring in rings for tensor in ring[1])
    assert not any(tensor.isnan().any() for ring in rings for slot in (0, 2) for tensor in ring[slot])
    for tensor, other in zip((*means, *variances), (*own[0], *own[1]), strict=True):
        torch.testing.assert_close(tensor, other, rtol=2e-6, atol=2e-6)


def test_no_launch_configuration_changes_a_bit(kernel_device: str) -> None:
    lists = moments_of(torch.float32, torch.float32, kernel_device, (9000, 3))
    results = []
    for config in (None, LaunchConfig(4096, 512, 8), LaunchConfig(1024, 256, 2), LaunchConfig.for_elements(1 << 27)):
        own = [[tensor.clone() for tensor in tensors] for tensors in lists]
        table = MomentsTable(own[0], own[1], lists[2], [own[3]], config)
        table.moments_(0.3, 0)
        results.append([tensor for k in (0, 1, 3) for tensor in own[k]])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


class _Allocations(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args: tuple = (), kwargs: object = None):
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)} | {
            tensor.untyped_storage().data_ptr() for tensor in _tensors(kwargs or {})
        }
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in values for tensor in _tensors(each)]


@pytest.mark.parametrize("piece", [7, 64, 1 << 16])
def test_pieces_on_a_cpu(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_moments.PIECE, "cpu", piece)
    for pair in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        lists = moments_of(*pair, "cpu", (3, 0, 1, 200, 64, 7, 9, 50))
        check(torch_moments_, lists, 0.3)
        means, variances, sources, deviations = lists
        update = backends.prepare_moments(means, variances, [deviations], sources, backend="torch")
        with _Allocations() as allocations:
            update.update_(0.3, 0)
            backends.sample_(sources, means, variances, [deviations], [0.5], 1.0, seed=1, step=2, backend="torch")
        assert allocations.largest <= piece


REFUSED = {
    "lengths": (([1], [1, 1], [1], [1]), ValueError, "2 variances but 1 means"),
    "sources": (([1], [1], [], [1]), ValueError, "1 means but 0 sources"),
    "shapes": (([2], [2], [2], [1]), ValueError, r"deviations(\[0\])?\[0\] has shape \(1,\)"),
    "broadcast": (([2], [2], [1], [2]), ValueError, r"means\[0\] has shape \(2,\) but sources\[0\]"),
}


@every
@pytest.mark.parametrize("case", REFUSED)
def test_lists_that_differ_are_refused(case: str, implementation: Moments) -> None:
    sizes, error, message = REFUSED[case]
    lists = [[torch.ones(size) for size in each] for each in sizes]
    with pytest.raises(error, match=message):
        implementation(lists[0], lists[1], lists[2], 0.5, lists[3])
    assert all((tensor == 1).all() for tensors in lists for tensor in tensors)


@every
def test_tensors_that_can_not_take_part_are_refused(implementation: Moments) -> None:
    good, base = [[torch.ones(8)] for _ in range(4)], torch.ones(20)
    for index, other, error, message in (
        (0, torch.ones(8, dtype=torch.int64), TypeError, r"means\[0\] is torch.int64; moments_ takes float32"),
        (2, torch.ones(8, dtype=torch.complex64), TypeError, r"sources\[0\] is torch.complex64"),
        (1, torch.ones(8, dtype=torch.float64), ValueError, r"variances\[0\] is torch.float64 on cpu but means\[0\]"),
        (3, torch.ones(8).bfloat16(), ValueError, r"deviations(\[0\])?\[0\] is torch.bfloat16"),
        (2, torch.ones(8, device="meta"), ValueError, "meta device"),
        (1, good[0][0], ValueError, r"means\[0\] and variances\[0\] overlap"),
        (2, good[0][0], ValueError, r"sources\[0\] overlaps means\[0\]"),
        (3, torch.ones(1).expand(8), ValueError, r"deviations(\[0\])?\[0\] overlaps itself"),
        (1, torch.ones(8, dtype=torch.complex64).conj().imag, ValueError, r"variances\[0\] is a negated"),
    ):
        means, variances, sources, deviations = ([other] if k == index else tensors for k, tensors in enumerate(good))
        with pytest.raises(error, match=message):
            implementation(means, variances, sources, 0.5, deviations)
    with pytest.raises(ValueError, match="overlap"):
        implementation([base[:8]], [base[7:15]], [torch.zeros(8)], 0.5)
    for weight in (-0.1, 1.1, float("nan"), None, "0.5"):
        with pytest.raises((ValueError, TypeError), match="weight must be"):
            implementation(good[0], good[1], good[2], weight, good[3])
    assert all((tensor == 1).all() for tensors in (*good, [base]) for tensor in tensors)


def test_slots_that_the_ring_does_not_have_are_refused() -> None:
    tensors = [[torch.ones(8)] for _ in range(5)]
    table = MomentsTable(tensors[0], tensors[1], tensors[2], tensors[3:])
    prepared = backends.prepare_moments(tensors[0], tensors[1], tensors[3:], tensors[2])
    for update in (table.moments_, prepared.update_):
        for slot, error, message in (
            (2, ValueError, "slot must be None or from 0 to 1, got 2"),
            (-1, ValueError, "slot"),
            (True, TypeError, "slot must be an int or None, got bool"),
            (0.0, TypeError, "slot must be an int or None, got float"),
        ):
            with pytest.raises(error, match=message):
                update(0.5, slot)
    with pytest.raises(ValueError, match="there are no slots"):
        MomentsTable(tensors[0], tensors[1], tensors[2]).moments_(0.5, 0)
    assert all((tensor == 1).all() for each in tensors for tensor in each)


def test_a_table_refuses_layouts_that_a_kernel_can_not_walk() -> None:
    mean, strided = torch.zeros(4, 6), torch.zeros(4, 12)[:, ::2]
    for index, other, message in (
        (0, strided, r"means\[0\]: its elements are not dense"),
        (1, torch.zeros(6, 4).t(), r"variances\[0\]: .* different strides"),
        (2, strided, r"sources\[0\]: .* different strides"),
        (3, torch.zeros(6, 4).t(), r"deviations\[0\]\[0\]: .* different strides"),
    ):
        lists = [[other if k == index else torch.zeros_like(mean)] for k in range(4)]
        if index == 0:
            lists = [[torch.zeros(4, 12)[:, ::2]] for _ in range(4)]
        with pytest.raises(ValueError, match=message):
            MomentsTable(lists[0], lists[1], lists[2], [lists[3]])


@pytest.mark.gpu
def test_moments_on_another_device_than_the_weights_and_no_wait_for_the_device() -> None:
    lists = moments_of(torch.float32, torch.float32, "cpu", (5, 2049))
    here = [[tensor.clone() for tensor in tensors] for tensors in lists]
    sources = [source.cuda() for source in lists[2]]
    backends.prepare_moments(lists[0], lists[1], [lists[3]], sources).update_(0.3, 0)
    reference.moments_(here[0], here[1], here[2], 0.3, here[3])
    for tensors, targets in zip(lists, here, strict=True):
        for tensor, target in zip(tensors, targets, strict=True):
            torch.testing.assert_close(tensor, target, rtol=1e-6, atol=1e-6)
    for dtype in (torch.float32, torch.float64):
        own = moments_of(dtype, torch.float32, "cuda", (5, 2049))
        update = backends.prepare_moments(own[0], own[1], [own[3]], own[2], backend="triton")
        update.update_(0.3, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            update.update_(0.3, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
