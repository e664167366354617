"""Weighted sums of lists of tensors: the reference against rational arithmetic, all others against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fastswa_kernels import combine as combine_module
from fastswa_kernels import combine_, reference
from fastswa_kernels.pairs import FLOAT_DTYPES
from tests.combine import COEFFICIENTS, IMPLEMENTATIONS, PAIRS, Combine, check, name, rows, same_bits
from tests.numerics import assert_weighted_sum

# Around the vector width, around both branches' blocks of every dtype, around the chunk, and odd tails.
SIZES = (0, 1, 3, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2049, 3001)


@pytest.mark.parametrize(("target", "source"), PAIRS, ids=name)
def test_the_reference_against_rational_arithmetic(target: torch.dtype, source: torch.dtype) -> None:
    targets, sources = rows(4, target, source, "cpu", (50,))
    sources[2][0].copy_(sources[0][0])  # cancels: its coefficient is that of the first, negated
    coefficients = [1e4 / 3, 0.1, -1e4 / 3, -0.7]
    terms = [
        [Fraction(c) * Fraction(value) for value in tensors[0].tolist()]
        for c, tensors in zip(coefficients, sources, strict=True)
    ]
    exact = torch.tensor([float(sum(column)) for column in zip(*terms, strict=True)], dtype=torch.float64)
    size = torch.tensor([float(sum(map(abs, column))) for column in zip(*terms, strict=True)], dtype=torch.float64)
    reference.combine_(targets, sources, coefficients)
    assert_weighted_sum(targets[0], exact, size, 4)


@pytest.mark.parametrize(("target", "source"), PAIRS, ids=name)
def test_the_kernel_on_every_pair_of_dtypes(target: torch.dtype, source: torch.dtype, kernel_device: str) -> None:
    check(combine_, *rows(2, target, source, kernel_device, SIZES), COEFFICIENTS[:2])


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_kernel_with_every_number_of_sources(count: int, kernel_device: str) -> None:
    for target, source in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        check(combine_, *rows(count, target, source, kernel_device, (5, 2049)), COEFFICIENTS[:count])


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_slices_at_odd_offsets_write_nothing_beside_them(offset: int, dtype: torch.dtype, kernel_device: str) -> None:
    # A target, or one of the sources alone, keeps the others from wide accesses.
    for own, first, second in ((offset, offset, offset), (offset, 0, 0), (0, 0, offset)):
        base = torch.full((4000,), 7.0, device=kernel_device)
        sources = [[torch.randn(4000, device=kernel_device).to(dtype)[at : at + 2500]] for at in (first, second)]
        check(combine_, [base[own : own + 2500]], sources, (0.3, 0.6))
        assert (base[:own] == 7).all()
        assert (base[own + 2500 :] == 7).all()


def test_wide_accesses_where_all_addresses_of_a_row_allow_them() -> None:
    # Chunks of 16 elements, 4 of float32 to an access: 3 chunks of each tensor, the last one of 7 elements.
    constants = combine_module.specialisation(torch.float32, torch.bfloat16)
    memory = torch.zeros(6, 64)
    for own, first, second, expected in ((0, 0, 0, 2), (1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 1, 0), (4, 4, 8, 2)):
        row = [memory[0, own:][:39], *(memory.bfloat16()[k, at:][:39] for k, at in ((1, first), (2, second)))]
        table, aligned = combine_module._table([row], 16, constants)
        assert aligned == expected
        assert sorted(table[:, 1].tolist()) == [7, 16, 16]
        assert (table[:aligned, 1] == 16).all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_memory_formats(implementation: Combine, device: str) -> None:
    image, wide = torch.randn(2, 4, 5, 3, device=device), torch.randn(2, 4, 5, 6, device=device)
    formats = [image, image.to(memory_format=torch.channels_last), wide[..., ::2]]
    formats.append(torch.randn(3, 5, 4, 2, device=device).permute(3, 2, 1, 0))
    for target, first, second in itertools.product(formats, formats, formats):
        own = wide.clone()[..., ::2] if target is formats[2] else torch.empty_like(target)
        strides = own.stride()
        check(implementation, [own], [[first], [second * 2]], (0.3, 0.6))
        assert own.stride() == strides
    # Any strides will do in a source, also none, and a view that negates.
    own, negated = image[0, 0].clone(), torch.randn(5, 3, dtype=torch.complex64, device=device).conj().imag
    assert negated.is_neg()
    check(implementation, [own], [[image[0, 0, 0].expand(5, 3)], [image[0, 0, :1, :1].expand(5, 3)]], (0.3, 0.6))
    check(implementation, [own], [[negated], [negated]], (0.3, 0.6))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_a_list_of_many_dtypes(implementation: Combine, device: str) -> None:
    columns = [rows(3, target, source, device, (33, 0, 1025)) for target, source in PAIRS]
    targets = [tensor for own, _ in columns for tensor in own]
    sources = [[tensor for _, lists in columns for tensor in lists[k]] for k in range(3)]
    check(implementation, targets, sources, (0.3, 0.0, -0.6))


def test_one_launch_for_each_pair_of_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **more: launches.append(arguments)

    monkeypatch.setattr(combine_module, "combine_kernel", Counted())
    targets, sources = rows(9, torch.float32, torch.float32, "cpu", SIZES)
    others, more = rows(9, torch.float32, torch.bfloat16, "cpu", SIZES)
    combine_(targets, sources, COEFFICIENTS)
    assert len(launches) == 1
    combine_([*targets, *others], [[*one, *other] for one, other in zip(sources, more, strict=True)], COEFFICIENTS)
    assert len(launches) == 3
    combine_([], [[], []], [0.5, 0.5])
    combine_([torch.zeros(0)], [[torch.zeros(0)]], [0.5])
    assert len(launches) == 3


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_coefficients_of_every_form(implementation: Combine, device: str) -> None:
    for coefficients in (
        [1, 0, -2],
        (True, 0.0, 0.25),
        torch.tensor([1 / 3, 0.0, -0.7], dtype=torch.float64),
        torch.tensor([1 / 3, 9, 0.0, 9, -0.7, 9])[::2],
        torch.tensor([1 / 3, 0.0, -0.7]).bfloat16(),
    ):
        check(implementation, *rows(3, torch.float64, torch.float32, device, (40, 1025)), coefficients)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_a_source_of_coefficient_zero_is_not_read(
    implementation: Combine, device: str, form: Callable[..., Any]
) -> None:
    targets, sources = rows(3, torch.float32, torch.float32, device, (5, 2049, 20001))
    for tensors in (sources[0], sources[2]):
        for tensor in tensors:
            tensor.fill_(float("nan"))
    implementation(targets, sources, form([0.0, 2.0, -0.0]))
    assert all(torch.equal(target, 2 * source) for target, source in zip(targets, sources[1], strict=True))
    implementation(targets, sources, form([0.0, 0.0, -0.0]))
    assert all(same_bits(target, torch.zeros_like(target)) for target in targets)
    implementation(targets, sources, form([1.0, 1.0, 0.0]))
    assert all(target.isnan().all() for target in targets)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=name)
def test_one_times_a_source_is_that_source_bit_for_bit(
    implementation: Combine, device: str, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    odd = [-0.0, 0.0, limits.max, limits.min, limits.tiny, float("inf"), -float("inf"), 1.0]
    if dtype != torch.bfloat16 or implementation is not combine_ or device == "cuda":
        odd.append(limits.tiny / 4)  # the interpreter loads no subnormal number of bfloat16
    source = torch.tensor(odd * 300, dtype=dtype, device=device)
    noise = torch.full_like(source, float("nan"))
    for place in range(3):
        target, lists = torch.ones_like(source), [[noise], [noise], [noise]]
        lists[place] = [source]
        implementation([target], lists, [float(k == place) for k in range(3)])
        assert same_bits(target, source)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_half_precision_is_reached_through_float32_everywhere(implementation: Combine, device: str) -> None:
    # Just above the middle between two numbers of float16, and in the middle once it is rounded to float32.
    value = 1 + 2**-11 + 2**-30
    target = torch.empty(1100, dtype=torch.float16, device=device)
    implementation([target], [[torch.full_like(target, value, dtype=torch.float64)]], [1.0])
    assert (target == 1).all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=name)
def test_a_target_may_be_one_of_its_sources(implementation: Combine, device: str, dtype: torch.dtype) -> None:
    def memory(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for make in (
        lambda: memory(3001),
        lambda: memory(4001)[1:],
        lambda: memory(5, 4, 6, 3).to(memory_format=torch.channels_last),
        lambda: memory(40, 60)[:, ::2],
    ):
        for place in range(3):
            lists = [[make()] for _ in range(3)]
            target, expected = lists[place][0], make()
            implementation([expected], [[tensor.clone() for tensor in tensors] for tensors in lists], [0.3, -0.6, 0.9])
            implementation([target], lists, [0.3, -0.6, 0.9])
            assert torch.equal(target, expected)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_a_tied_tensor_is_combined_once(implementation: Combine, device: str) -> None:
    for size in (9, 20001):
        weight, other = torch.full((size,), 4.0, device=device), torch.full((size,), 8.0, device=device)
        implementation([weight, weight], [[weight, weight], [other, other]], [0.5, 0.25])
        assert (weight == 4).all()
        implementation([weight, weight], [[weight, weight], [other, other]], [0.5, 0.5])
        assert (weight == 6).all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_in_one_tensor() -> None:
    target = torch.zeros((1 << 31) + 12345, device="cuda", dtype=torch.bfloat16)
    combine_([target], [[torch.ones_like(target)], [torch.full_like(target, 3.0)]], [0.25, 0.5])
    assert bool((target == 1.75).all())
