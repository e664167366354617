"""Samples from running moments: kernel, plain torch and reference against float64 on the same normal numbers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastswa import backends, torch_moments
from fastswa_kernels import LaunchConfig, moments_table, reference, sample_
from fastswa_kernels.normal import normal
from fastswa_kernels.pairs import FLOAT_DTYPES, dense_view
from fastswa_kernels.rounding import seed_key, step_key
from fastswa_kernels.sample_kernel import sample_kernel
from tests.numerics import NORMAL_ERROR, SUM_ULPS, ulp

Tensors = list[Tensor]
Sample = Callable[..., None]
# Around the vector width, both branches' blocks, the chunk; odd tails.
SIZES = (0, 1, 5, 511, 512, 513, 1023, 1025, 2049, 3001)
COEFFICIENTS = (0.7, -1.3, 0.0, 1e-3, 2.0) * 4
PAIRS = [*itertools.product(FLOAT_DTYPES, FLOAT_DTYPES)]
name = lambda value: str(value).removeprefix("torch.")  # noqa: E731


def torch_sample_(*arguments: object, seed: int, step: int) -> None:
    """The path of the CPU, through the choice of backends."""
    backends.sample_(*arguments, seed=seed, step=step, backend="torch")  # type: ignore[arg-type]


IMPLEMENTATIONS = {"kernel": sample_, "torch": torch_sample_, "reference": reference.sample_}
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


def moments(
    count: int, dtype: torch.dtype, device: str, sizes: tuple[int, ...] = SIZES
) -> tuple[Tensors, Tensors, list[Tensors]]:
    """Means, variances and `count` deviations of about one size, so that none of them hides another."""
    lists = [[torch.randn(size, device=device) for size in sizes] for _ in range(2 + count)]
    lists[1] = [variance.abs() for variance in lists[1]]
    means, variances, *deviations = [[tensor.to(dtype) for tensor in tensors] for tensors in lists]
    return means, variances, deviations


def check(
    implementation: Sample,
    targets: Tensors,
    means: Tensors,
    variances: Tensors,
    deviations: list[Tensors],
    coefficients: tuple[float, ...],
    diagonal: float,
) -> None:
    """One sample against the formula in float64, by numbers of seed 1 and step 2."""
    implementation(targets, means, variances, deviations, coefficients, diagonal, seed=1, step=2)
    first = 0
    for index, (target, mean) in enumerate(zip(targets, means, strict=True)):
        z = torch.empty_like(mean, dtype=torch.float32, memory_format=torch.preserve_format)
        dense_view(z).copy_(normal(first, mean.numel(), 1, 2, torch.device("cpu")))
        first += mean.numel()
        terms = [mean.double()]
        if diagonal:
            terms.append(diagonal * variances[index].double().sqrt() * z.double())
        for tensors, coefficient in zip(deviations, coefficients, strict=True):
            if coefficient:
                terms.append(coefficient * tensors[index].double())
        exact, size = sum(terms), sum(term.abs() for term in terms)
        wide = torch.float64 in (target.dtype, mean.dtype)
        # Each of K products rounds twice, the factor too, each sum once; and three for the diagonal's product.
        roundings = (3 * len(deviations) + 5) * (2**-53 if wide else 2**-24)
        truncated = target.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
        # numerics.py: the interpreter truncates where a GPU rounds.
        stored = 1.0 if truncated and implementation is sample_ else SUM_ULPS[target.dtype]
        bound = stored * ulp(exact.abs(), target.dtype) + (roundings + bool(diagonal) * NORMAL_ERROR) * size
        error = (target.double() - exact).abs()
        assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


@every
@pytest.mark.parametrize(("target", "moment"), PAIRS, ids=name)
def test_every_pair_of_dtypes(
    implementation: Sample, target: torch.dtype, moment: torch.dtype, kernel_device: str
) -> None:
    means, variances, deviations = moments(2, moment, kernel_device, (5, 2049))
    targets = [torch.full_like(mean, torch.nan, dtype=target) for mean in means]
    check(implementation, targets, means, variances, deviations, COEFFICIENTS[:2], 0.6)


@every
@pytest.mark.parametrize("count", [0, 1, 3, 20])
@pytest.mark.parametrize("diagonal", [0.0, 0.5**0.5, 1])
def test_edge_sizes_and_every_number_of_deviations(
    implementation: Sample, count: int, diagonal: float, kernel_device: str
) -> None:
    means, variances, deviations = moments(count, torch.float32, kernel_device)
    targets = [torch.full_like(mean, torch.nan) for mean in means]
    check(implementation, targets, means, variances, deviations, COEFFICIENTS[:count], diagonal)
    implementation([], [], [], [[] for _ in range(count)], COEFFICIENTS[:count], diagonal, seed=1, step=2)


@every
def test_the_numbers_of_a_kernel_are_those_of_normal(implementation: Sample, kernel_device: str) -> None:
    zero, one = torch.zeros(3000, device=kernel_device), torch.ones(3000, device=kernel_device)
    for seed, step in ((0, 0), (-1, 2**40 + 3), (2**63 + 7, 1)):
        target = torch.empty_like(zero)
        implementation([target], [zero], [one], [], [], 1.0, seed=seed, step=step)
        z = normal(0, 3000, seed, step, torch.device("cpu")).to(kernel_device)
        assert ((target - z).abs() <= NORMAL_ERROR * z.abs()).all()


@every
def test_what_does_not_count_is_not_read(implementation: Sample, kernel_device: str) -> None:
    means, variances, deviations = moments(3, torch.float32, kernel_device, (2049,))
    nan = [torch.full((2049,), torch.nan, device=kernel_device)]
    target = [torch.empty(2049, device=kernel_device)]
    check(implementation, target, means, variances, [deviations[0], nan, deviations[1]], (0.3, 0.0, 0.4), 1.0)
    check(implementation, target, means, nan, deviations, (0.3, 0.1, 0.4), 0.0)
    implementation(target, means, variances, [nan], [1.0], 1.0, seed=1, step=2)
    assert target[0].isnan().all()


@every
def test_coefficients_in_a_tensor(implementation: Sample, kernel_device: str) -> None:
    means, variances, deviations = moments(2, torch.float32, kernel_device, (100,))
    first, second = [torch.empty(100, device=kernel_device)], [torch.empty(100, device=kernel_device)]
    implementation(first, means, variances, deviations, [0.5, -0.25], 1.0, seed=1, step=2)
    implementation(second, means, variances, deviations, torch.tensor([0.5, -0.25]), 1.0, seed=1, step=2)
    assert torch.equal(first[0], second[0])


@every
def test_odd_offsets_write_nothing_beside_them(implementation: Sample, kernel_device: str) -> None:
    for own, mean, variance, deviation in ((1, 1, 1, 1), (0, 0, 0, 2), (0, 3, 0, 0), (1, 0, 2, 3), (4, 8, 12, 16)):
        base = torch.full((4000,), 7.0, device=kernel_device)
        rows = torch.rand(3, 4000, device=kernel_device)
        lists = [[rows[k, offset : offset + 2500]] for k, offset in enumerate((mean, variance, deviation))]
        check(implementation, [base[own : own + 2500]], lists[0], lists[1], [lists[2]], (0.3,), 0.6)
        assert (base[:own] == 7).all()
        assert (base[own + 2500 :] == 7).all()


@every
def test_memory_formats(implementation: Sample, kernel_device: str) -> None:
    wide = torch.rand(2, 4, 5, 6, device=kernel_device)
    formats = [wide[..., :3].contiguous(), wide[..., :3].contiguous(memory_format=torch.channels_last), wide[..., ::2]]
    for layouts in itertools.product(formats, repeat=4):
        target, mean, variance, deviation = (
            [wide.clone()[..., ::2] if tensor is formats[2] else tensor.clone()] for tensor in layouts
        )
        if dense_view(mean[0]) is not None:
            check(implementation, target, mean, variance, [deviation], (0.3,), 0.6)
        else:
            # Its gaps closed, it is contiguous, and numbered so.
            expected = [torch.empty(2, 4, 5, 3, device=kernel_device)]
            reference.sample_(expected, [mean[0].contiguous()], variance, [deviation], [0.3], 0.6, seed=1, step=2)
            implementation(target, mean, variance, [deviation], [0.3], 0.6, seed=1, step=2)
            torch.testing.assert_close(target[0], expected[0], rtol=0, atol=2e-6)


def test_memory_formats_in_pieces_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_moments.PIECE, "cpu", 16)
    test_memory_formats(torch_sample_, "cpu")


@every
def test_elements_are_numbered_through_the_list(implementation: Sample, kernel_device: str) -> None:
    mean, variance = torch.zeros(3000, device=kernel_device), torch.ones(3000, device=kernel_device)

    def drawn(*cuts: int, before: torch.dtype | None = None, step: int = 2) -> Tensor:
        """A sample of a tensor that is cut into several; after another of 7 elements, listed twice, of some dtype."""
        result = torch.empty_like(mean)
        lists = [list(tensor.tensor_split(cuts)) for tensor in (result, mean, variance)]
        if before is not None:
            first = [torch.ones(7, dtype=before, device=kernel_device) for _ in range(3)]
            lists = [[tensor, tensor, *tensors] for tensor, tensors in zip(first, lists, strict=True)]
        implementation(*lists, [], [], 1.0, seed=1, step=step)
        return result

    whole = drawn()
    assert ((whole - drawn(5, 1001)).abs() <= NORMAL_ERROR * whole.abs()).all()
    shifted = drawn(before=torch.float32)
    # The tied tensor is drawn once, and both its entries are numbered.
    assert ((shifted[:-14] - whole[14:]).abs() <= NORMAL_ERROR * whole[14:].abs()).all()
    assert ((shifted - drawn(1001, before=torch.float64)).abs() <= NORMAL_ERROR * shifted.abs()).all()
    other = drawn(step=3)
    assert (other - whole).abs().median() > 0.5


@every
@pytest.mark.parametrize("strided", [False, True])
def test_a_tied_weight_is_drawn_once(implementation: Sample, strided: bool) -> None:
    targets, mean, variance = [torch.empty(9), torch.empty(5)], torch.zeros(9), torch.ones(9)
    if strided:
        targets[0] = torch.empty(9, 2)[:, 0]
    lists = [[targets[0], targets[1], targets[0]], [mean, mean[:5], mean], [variance, variance[:5], variance]]
    implementation(*lists, [], [], 1.0, seed=1, step=2)
    z = normal(0, 14, 1, 2, torch.device("cpu"))
    torch.testing.assert_close(torch.cat(targets), z, rtol=NORMAL_ERROR, atol=0)


def test_element_numbers_beyond_32_bits(kernel_device: str) -> None:
    # No test has the memory to reach them otherwise.
    mean, variance = [torch.zeros(3000, device=kernel_device)], [torch.ones(3000, device=kernel_device)]
    target = [torch.empty(3000, device=kernel_device)]
    (launch,) = moments_table.prepare(target, mean, variance, [], [0], "TARGET")
    launch.table[:, 2] += 2**32 - 1000
    numbers = torch.ones(1, device=kernel_device)
    launch.launch(sample_kernel, numbers, step_key(seed_key(1), 2), DIAGONAL=True)
    z = normal(2**32 - 1000, 3000, 1, 2, torch.device("cpu")).to(kernel_device)
    assert ((target[0] - z).abs() <= NORMAL_ERROR * z.abs()).all()


def test_no_launch_configuration_changes_a_bit(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    means, variances, deviations = moments(2, torch.float32, kernel_device, (9000, 3))
    results = []
    for config in (LaunchConfig(), LaunchConfig(4096, 512, 8), LaunchConfig(1024, 256, 2), LaunchConfig(16384)):
        monkeypatch.setattr(LaunchConfig, "for_elements", lambda *_, config=config: config)
        results.append([torch.empty_like(mean) for mean in means])
        sample_(results[-1], means, variances, deviations, [0.5, 2.0], 1.0, seed=1, step=2)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@every
def test_what_can_not_be_drawn_is_refused(implementation: Sample) -> None:
    good = {name: [torch.ones(8)] for name in ("targets", "means", "variances")} | {"deviations": [[torch.ones(8)]]}
    numbers = {"coefficients": [0.5], "diagonal": 1.0}
    mean = good["means"][0]
    for changed, error, message in (
        ({"targets": []}, ValueError, "0 targets but 1 means"),
        ({"variances": []}, ValueError, "0 variances but 1 means"),
        ({"deviations": [[]]}, ValueError, r"0 deviations\[0\] but 1 means"),
        ({"targets": [torch.ones(8, 1)]}, ValueError, r"targets\[0\] has shape \(8, 1\) but means\[0\]"),
        ({"deviations": [[torch.ones(1)]]}, ValueError, r"deviations\[0\]\[0\] has shape \(1,\)"),
        ({"targets": [torch.ones(8, dtype=torch.int32)]}, TypeError, r"targets\[0\] is torch.int32; sample_ takes"),
        ({"means": [torch.ones(8, dtype=torch.complex64)]}, TypeError, r"means\[0\] is torch.complex64"),
        ({"variances": [torch.ones(8).half()]}, ValueError, r"variances\[0\] is torch.float16 on cpu but means\[0\]"),
        ({"means": [torch.ones(8, device="meta")]}, ValueError, "meta device"),
        ({"targets": [mean]}, ValueError, r"means\[0\] overlaps targets\[0\] in memory; draw into the weights"),
        ({"targets": [torch.ones(1).expand(8)]}, ValueError, r"targets\[0\] overlaps itself"),
        ({"coefficients": []}, ValueError, "coefficients must be 1 finite floats"),
        ({"coefficients": [float("nan")]}, ValueError, "coefficients must be 1 finite floats"),
        ({"coefficients": ["1"]}, TypeError, "coefficients must be 1 finite floats"),
        ({"diagonal": -0.1}, ValueError, "diagonal must be finite and not negative, got -0.1"),
        ({"diagonal": float("nan")}, ValueError, "diagonal must be finite"),
        ({"diagonal": float("inf")}, ValueError, "diagonal must be finite"),
        ({"diagonal": "1"}, TypeError, "diagonal must be a float, got str"),
    ):
        arguments = {**good, **numbers, **changed}
        with pytest.raises(error, match=message):
            implementation(*arguments.values(), seed=1, step=2)
    tensors = (*good["targets"], *good["means"], *good["variances"], *good["deviations"][0])
    assert all((tensor == 1).all() for tensor in tensors)


@pytest.mark.gpu
def test_a_sample_from_another_device() -> None:
    means, variances, deviations = moments(2, torch.float32, "cpu", (5, 2049))
    here, there = [[torch.empty_like(mean, device=device) for mean in means] for device in ("cpu", "cuda")]
    backends.sample_(here, means, variances, deviations, [0.5, 2.0], 1.0, seed=1, step=2)
    backends.sample_(there, means, variances, deviations, [0.5, 2.0], 1.0, seed=1, step=2)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    own = [[tensor.cuda() for tensor in tensors] for tensors in (means, variances, *deviations)]
    backends.sample_(there, own[0], own[1], own[2:], [0.5, 2.0], 1.0, seed=1, step=2, backend="triton")
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=2e-6, atol=2e-6)
