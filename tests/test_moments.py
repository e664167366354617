"""Running means, variances and deviations: kernel, plain torch and reference against extended precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastswa import backends, torch_moments
from fastswa_kernels import LaunchConfig, MomentsTable, lerp_, moments_, moments_table, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.moments import PAIRS, Moments, check, every, moments_of, name, torch_moments_
from tests.numerics import assert_close_in_ulps

# Both sides of the two-sided form, and what needs a select.
WEIGHTS = (0.3, 0.5, 1 / 3, 1e-3, 0.75, 1.0, 0.0)


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


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_mean_is_that_of_lerp(weight: float, kernel_device: str) -> None:
    means, variances, sources, deviations = moments_of(torch.float32, torch.float32, kernel_device, (3001,))
    for take, move in ((moments_, lerp_), (reference.moments_, reference.lerp_)):
        own, expected = [means[0].clone()], [means[0].clone()]
        take(own, variances, sources, weight, deviations)
        move(expected, sources, weight)
        if kernel_device == "cpu":
            assert torch.equal(own[0], expected[0])
        else:
            # A fused multiply-add saves a rounding in one kernel and perhaps not in the other.
            assert_close_in_ulps(own[0], expected[0].double(), 1.0, means[0], sources[0])


@every
def test_a_large_weight_loses_nothing_to_a_far_mean(implementation: Moments, kernel_device: str) -> None:
    # A distance of twice the source has twice its ulp, so it is rounded by up to a whole ulp of the source. mean + w d
    # would keep 97 % of that. The two-sided form keeps 3 %, as much for the product, and half an ulp for the sum.
    mean, source = [torch.rand(3001, device=kernel_device) * 0.1 + at for at in (-2.0, 1.9)]
    means, variances, sources = [mean.clone()], [torch.zeros_like(mean)], [source]
    implementation(means, variances, sources, 0.97)
    w = torch.tensor(0.97).double().to(kernel_device)
    assert_close_in_ulps(means[0], mean.double() + w * (source.double() - mean.double()), 0.6, mean, source)


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


def test_memory_formats_in_pieces_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_moments.PIECE, "cpu", 16)
    test_memory_formats(torch_moments_, "cpu")


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


def test_wide_accesses_where_all_addresses_of_a_row_allow_them() -> None:
    # Chunks of 16 elements, 4 of float32 to an access: 3 chunks, the last one of 7 elements.
    memory, config = torch.zeros(5, 64), LaunchConfig(16, 16)
    for offsets, expected in (
        ((0, 0, 0, 0, 0), 2),
        ((4, 8, 12, 16, 20), 2),
        *((tuple(int(k == odd) for k in range(5)), 0) for odd in range(5)),
    ):
        source, mean, variance, first, second = (memory[k, at : at + 39] for k, at in enumerate(offsets))
        (launch,) = moments_table.prepare([source], [mean], [variance], [[first], [second]], [0], "SOURCE", config)
        assert launch.aligned_rows == expected
        assert sorted(launch.table[:, 1].tolist()) == [7, 16, 16]
        assert (launch.table[:expected, 1] == 16).all()


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
