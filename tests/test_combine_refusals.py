"""What weighted sums refuse, and how; and which code runs them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastswa import backends, torch_combine
from fastswa_kernels import combine_, reference
from tests.combine import Combine
from tests.numerics import assert_weighted_sum

REFUSING = {"reference": reference.combine_, "torch": backends.combine_, "kernel": combine_}

# Each stands second in its lists, after a pair that could be written.
REFUSED: dict[str, tuple[Tensor, list[Tensor | None], type[Exception], str]] = {
    "no lists": (torch.zeros(3), [], ValueError, "no list of sources"),
    "a short list": (torch.zeros(3), [torch.ones(3), None], ValueError, r"2 targets but 1 sources\[1\]"),
    "shapes": (
        torch.zeros(4, 1),
        [torch.ones(4, 1), torch.ones(4)],
        ValueError,
        r"targets\[1\] has shape \(4, 1\) but sources\[1\]\[1\] has \(4,\)",
    ),
    "integer target": (torch.zeros(3).int(), [torch.ones(3)], TypeError, r"targets\[1\] is torch.int32"),
    "complex source": (
        torch.zeros(3),
        [torch.ones(3), torch.ones(3) * 1j],
        TypeError,
        r"sources\[1\]\[1\] is torch.complex64.*torch.view_as_real",
    ),
    "two dtypes": (
        torch.zeros(3),
        [torch.ones(3), torch.ones(3).half()],
        ValueError,
        r"sources\[1\]\[1\] is torch.float16 on cpu but sources\[0\]\[1\] torch.float32 on cpu; all sources of one",
    ),
    "meta source": (torch.zeros(3), [torch.ones(3, device="meta")], ValueError, "meta device"),
    "negated target": (
        torch.ones(3, dtype=torch.complex64).conj().imag,
        [torch.ones(3)],
        ValueError,
        r"targets\[1\] is a negated or conjugated view",
    ),
}


@pytest.mark.parametrize("implementation", REFUSING.values(), ids=REFUSING)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_lists_are_refused(case: str, implementation: Combine) -> None:
    bad, columns, error, message = REFUSED[case]
    good, before = torch.zeros(5), bad.clone()
    sources = [[torch.ones(5)] if column is None else [torch.ones(5), column] for column in columns]
    with pytest.raises(error, match=message):
        implementation([good, bad], sources, [0.5] * len(sources))
    assert (good == 0).all()
    assert torch.equal(bad, before)


@pytest.mark.parametrize("implementation", REFUSING.values(), ids=REFUSING)
def test_overlapping_memory_is_refused(implementation: Combine) -> None:
    base, ones = torch.zeros(100), torch.ones(10)
    square = base[:9].view(3, 3)
    for targets, lists, message in (
        (
            [base[:10]],
            [[base[5:15]]],
            r"sources\[0\]\[0\] overlaps targets\[0\] in memory; a target may be one of its own",
        ),
        ([base[:10]], [[base[:10]], [base[1:11]]], r"sources\[1\]\[0\] overlaps targets\[0\]"),
        ([square], [[square.t()]], r"sources\[0\]\[0\] overlaps targets\[0\]"),
        ([base[:10], base[20:30]], [[base[20:30], ones]], r"sources\[0\]\[0\] overlaps targets\[1\]"),
        ([base[:10], base[5:15]], [[ones, ones]], r"targets\[0\] and targets\[1\] overlap"),
        ([base[:10], base[:10]], [[ones, ones * 2]], r"targets\[0\] and targets\[1\] overlap"),
        ([base[:5].view(torch.bfloat16)], [[base[:5].view(torch.float16)]], r"sources\[0\]\[0\] overlaps targets\[0\]"),
        ([torch.zeros(1).expand(4)], [[torch.ones(4)]], r"targets\[0\] overlaps itself"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation(targets, lists, [0.5] * len(lists))
    assert (base == 0).all()
    # Neighbours in one memory are no overlap.
    implementation([base[:50]], [[base[50:]]], [0.5])


@pytest.mark.parametrize("implementation", REFUSING.values(), ids=REFUSING)
@pytest.mark.parametrize(
    "coefficients",
    [[0.5], [0.5, float("nan")], [0.5, float("inf")], torch.ones(3), torch.ones(2).int(), torch.tensor(1.0), 0.5, "ab"],
    ids=str,
)
def test_bad_coefficients_are_refused(coefficients: Any, implementation: Combine) -> None:
    target = torch.zeros(3)
    with pytest.raises((ValueError, TypeError), match=r"coefficients must be 2 finite floats or a floating tensor"):
        implementation([target], [[torch.ones(3)], [torch.ones(3)]], coefficients)
    assert (target == 0).all()


def test_backends_that_can_not_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target, sources = torch.zeros(3), [[torch.ones(3)]]
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.combine_([target], sources, [1.0], backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="backend='triton' can't run here: the kernels run on CUDA"):
        backends.combine_([target], sources, [1.0], backend="triton")
    with pytest.raises(ValueError, match=r"targets\[0\]: the kernels run on CUDA"):
        combine_([target], sources, [1.0])
    assert (target == 0).all()


def test_the_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_combine, "combine_", None)
    target = torch.zeros(3, requires_grad=True)
    backends.combine_([target], [[torch.ones(3)]], [0.5], backend="triton")
    assert (target == 0.5).all()
    with pytest.raises(TypeError, match="NoneType"):
        backends.combine_([target], [[torch.ones(3)]], [0.5], backend="auto")


@pytest.mark.gpu
def test_targets_and_sources_on_several_devices() -> None:
    places = list(itertools.product(("cpu", "cuda"), ("cpu", "cuda")))
    targets = [torch.zeros(5000, device=own) for own, _ in places]
    sources = [[torch.randn(5000, device=other) for _, other in places] for _ in range(2)]
    exact = [torch.empty_like(target, dtype=torch.float64) for target in targets]
    reference.combine_(exact, sources, [0.3, -0.6])
    backends.combine_(targets, sources, [0.3, -0.6])
    for target, result, *read in zip(targets, exact, *sources, strict=True):
        size = sum(tensor.to(target.device).abs() for tensor in read)
        assert_weighted_sum(target, result, size, 2)
