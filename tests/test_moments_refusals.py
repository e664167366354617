"""What running moments refuse, and that nothing is written then."""

from __future__ import annotations

import pytest
import torch

from fastswa import backends
from fastswa_kernels import MomentsTable
from tests.moments import Moments, every

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
