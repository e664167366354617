"""What the kernels' interface refuses, and how."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastswa_kernels
from fastswa_kernels import LerpTable, MultiLerpTable, lerp_, multi_lerp_, reference

Implementation = Callable[[list[Tensor], list[Tensor], float], None]

REFUSED = {
    "lengths differ": ([torch.zeros(3)], [], ValueError, "1 averages but 0 sources"),
    "shapes differ": ([torch.zeros(8, 1)], [torch.zeros(1, 1)], ValueError, r"averages\[0\] has shape \(8, 1\)"),
    "integers": ([torch.zeros(3, dtype=torch.int64)], [torch.zeros(3)], TypeError, r"averages\[0\] is torch.int64"),
    "complex": ([torch.zeros(3)], [torch.zeros(3, dtype=torch.complex64)], TypeError, r"sources\[0\] is torch.complex"),
    "meta": ([torch.zeros(3, device="meta")], [torch.zeros(3)], ValueError, "meta device"),
}


@pytest.mark.parametrize("implementation", [lerp_, reference.lerp_], ids=["kernel", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_lists_are_refused(case: str, implementation: Implementation) -> None:
    averages, sources, error, message = REFUSED[case]
    before = [average.clone() for average in averages if not average.is_meta]
    with pytest.raises(error, match=message):
        implementation(averages, sources, 0.5)
    assert all(map(torch.equal, before, [average for average in averages if not average.is_meta]))


@pytest.mark.parametrize("implementation", [lerp_, reference.lerp_], ids=["kernel", "reference"])
def test_overlapping_memory_is_refused(implementation: Implementation) -> None:
    base = torch.zeros(100)
    others = [torch.zeros(10), torch.zeros(10)]
    for averages, sources, message in (
        ([*others, base[:60]], [torch.ones(10), torch.ones(10), base[40:]], r"sources\[2\] overlaps averages\[2\]"),
        ([base[:10], others[0]], [others[1], base[5:15]], r"sources\[1\] overlaps averages\[0\]"),
        ([base[:10], base[5:15]], others, r"averages\[0\] and averages\[1\] overlap"),
        ([base], [base], "overlaps"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation(averages, sources, 0.5)
    for selfish in (torch.zeros(5).as_strided((3, 3), (1, 1)), torch.zeros(1).expand(4)):
        with pytest.raises(ValueError, match=r"averages\[0\] overlaps itself"):
            implementation([selfish], [torch.ones(selfish.shape)], 0.5)
    assert (base == 0).all()
    # Neighbours in one memory are no overlap.
    implementation([base[:50]], [base[50:]], 0.5)


@pytest.mark.parametrize("implementation", [lerp_, reference.lerp_], ids=["kernel", "reference"])
@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), torch.tensor([0.5]), torch.tensor(1), None, "0.5"])
def test_bad_weights_are_refused(weight: float | Tensor, implementation: Implementation) -> None:
    with pytest.raises((ValueError, TypeError), match="weight must be"):
        implementation([torch.zeros(3)], [torch.ones(3)], weight)


@pytest.mark.parametrize("weight", [0, 1, True, np.float32(0.5), np.float64(0.5), torch.tensor(0.5).bfloat16()])
def test_weights_of_other_types(weight: float | Tensor) -> None:
    average, exact = [torch.zeros(3)], [torch.zeros(3)]
    lerp_(average, [torch.ones(3)], weight)
    reference.lerp_(exact, [torch.ones(3)], weight)
    assert torch.equal(average[0], exact[0])
    assert average[0][0] == float(weight)


def test_negated_and_conjugated_views() -> None:
    negated = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert negated.is_neg()
    average = [torch.zeros(2)]
    lerp_(average, [negated], 1.0)
    assert average[0].tolist() == [-2, -4]
    for implementation in (lerp_, reference.lerp_):
        with pytest.raises(ValueError, match=r"averages\[0\] is a negated or conjugated view"):
            implementation([negated], [torch.zeros(2)], 0.5)
    with pytest.raises(ValueError, match=r"copy_to\[0\]: the source is a negated"):
        LerpTable([], [], [torch.zeros(2, dtype=torch.complex64)], [torch.ones(2, dtype=torch.complex64).conj()])


def test_a_table_says_which_tensor_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"averages\[1\]: the average and its source have different strides"):
        LerpTable([torch.zeros(2), torch.zeros(2, 3)], [torch.zeros(2), torch.zeros(3, 2).t()])
    with pytest.raises(ValueError, match=r"copy_to\[0\] is torch.int64 but copy_from\[0\] torch.int32"):
        LerpTable([], [], [torch.zeros(2, dtype=torch.int64)], [torch.zeros(2, dtype=torch.int32)])


def test_a_copy_must_not_meet_an_average() -> None:
    average, counter = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match="overlap"):
        LerpTable([average], [torch.ones(4)], [average], [counter])
    with pytest.raises(ValueError, match="overlap"):
        LerpTable([], [], [counter[:3]], [counter[1:]])


MULTI = [multi_lerp_, reference.multi_lerp_]
REFUSED_MULTI: dict[str, tuple[Callable[[], dict[str, object]], type[Exception], str]] = {
    "no list": (lambda: {"averages": [], "weights": []}, ValueError, "no list of averages"),
    "too few": (lambda: {"averages": [[torch.zeros(3)], []]}, ValueError, r"0 averages\[1\] but 1 sources"),
    "shape": (lambda: {"averages": [[torch.zeros(3)], [torch.zeros(4)]]}, ValueError, r"averages\[1\]\[0\] has shape"),
    "dtypes": (
        lambda: {"averages": [[torch.zeros(3)], [torch.zeros(3).half()]]},
        ValueError,
        r"averages\[1\]\[0\] is torch.float16 on cpu but averages\[0\]\[0\] torch.float32",
    ),
    "integers": (lambda: {"averages": [[torch.zeros(3, dtype=torch.int64)]] * 2}, TypeError, r"averages\[0\]\[0\] is"),
    "same twice": (
        lambda: {"averages": [[(same := torch.zeros(3))], [same]]},
        ValueError,
        r"averages\[0\]\[0\] and averages\[1\]\[0\] overlap",
    ),
    "source": (
        lambda: {"averages": [[torch.zeros(3)], [(same := torch.zeros(3))]], "sources": [same]},
        ValueError,
        r"sources\[0\] overlaps averages\[1\]\[0\]",
    ),
    "number": (lambda: {"weights": [0.5]}, ValueError, "weights must be 2 floats"),
    "range": (lambda: {"weights": [0.5, 1.5]}, ValueError, "weights must be 2 floats"),
    "nan": (lambda: {"weights": [0.5, float("nan")]}, ValueError, "weights must be 2 floats"),
    "float": (lambda: {"weights": 0.5}, TypeError, "weights must be 2 floats"),
    "text": (lambda: {"weights": "ab"}, TypeError, "weights must be 2 floats"),
    "tensors": (lambda: {"weights": [torch.tensor(0.5)] * 2}, TypeError, "weights must be 2 floats"),
    "tensor shape": (lambda: {"weights": torch.zeros(3)}, ValueError, r"floating tensor of shape \(2,\)"),
    "tensor dtype": (lambda: {"weights": torch.zeros(2).int()}, ValueError, r"floating tensor of shape \(2,\)"),
    "rounding": (lambda: {"rounding": "stochastic"}, TypeError, "rounding must be a StochasticRounding or None"),
    "flags": (lambda: {"skip": torch.zeros(2)}, ValueError, "skip must have one element"),
    "complex flag": (lambda: {"skip": torch.zeros(1, dtype=torch.complex64)}, TypeError, "skip must be a real tensor"),
    "host flag": (lambda: {"skip": True}, TypeError, "skip must be a real tensor"),
}


@pytest.mark.parametrize("implementation", MULTI, ids=["kernel", "reference"])
@pytest.mark.parametrize("case", REFUSED_MULTI)
def test_a_refused_multi_lerp_leaves_everything_unwritten(case: str, implementation: Callable[..., None]) -> None:
    make, error, message = REFUSED_MULTI[case]
    arguments = {"averages": [[torch.zeros(3)], [torch.zeros(3)]], "sources": [torch.ones(3)], "weights": [0.5, 1.0]}
    arguments |= make()
    before = [[tensor.clone() for tensor in tensors] for tensors in arguments["averages"]]
    with pytest.raises(error, match=message):
        implementation(**arguments)
    for tensors, old in zip(arguments["averages"], before, strict=True):
        assert all(map(torch.equal, tensors, old))


def test_a_table_of_several_averages_names_what_it_refuses() -> None:
    good, turned = torch.zeros(2, 3), torch.zeros(3, 2).t()
    with pytest.raises(ValueError, match=r"averages\[1\]\[0\]: the average and its source have different strides"):
        MultiLerpTable([[good], [turned]], [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"copy_to\[0\] and averages\[0\]\[0\] overlap|averages\[0\]\[0\] and copy_to"):
        MultiLerpTable([[good]], [torch.zeros(2, 3)], [good], [torch.zeros(2, 3)])


def test_refusal_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastswa_kernels.refusal(torch.device("cpu")) is None  # the interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert fastswa_kernels.refusal(torch.device("cpu")) == "the kernels run on CUDA and ROCm devices, not on cpu"
    assert fastswa_kernels.refusal(torch.device("cuda")) is None
    monkeypatch.setattr("fastswa_kernels.table.find_spec", lambda _: None)
    assert fastswa_kernels.refusal(torch.device("cuda")) == "triton is not installed"
