"""The operations that the update in plain torch chooses from: equal where torch's fused SGD stands in for a lerp."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastswa import AveragedModel
from fastswa.torch_lerp import WORTH_A_THREAD, quickest
from fastswa.torch_update import TorchUpdate
from tests.numerics import assert_close_in_ulps, lerp_ulps

LARGE = WORTH_A_THREAD * max(1, torch.get_num_threads() - 1) + 5
"""Elements that the fused SGD is chosen for, with an end that no vector of a processor divides."""
SHAPE = (LARGE // 256 + 1, 16, 4, 4)


def is_fused(average: Tensor, source: Tensor) -> bool:
    return quickest(average, source, average.dtype) is not torch._foreach_lerp_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.4999, 0.5, 0.9])
def test_the_fused_step_gives_the_formula(dtype: torch.dtype, weight: float) -> None:
    averages, sources = ([torch.randn(size, dtype=dtype) for size in (LARGE, LARGE + 1)] for _ in range(2))
    before = [average.clone() for average in averages]
    operation = quickest(averages[0], sources[0], dtype)
    assert operation is not torch._foreach_lerp_
    operation(averages, sources, weight)
    used = torch.tensor(weight, dtype=dtype).item()
    # Longer than float64, to which the exact value is rounded: by half an ulp of a result that is as long.
    allowed = lerp_ulps(dtype) + (0.5 if dtype == torch.float64 else 0.0)
    for average, old, new in zip(averages, before, sources, strict=True):
        wide_old, wide_new = (tensor.numpy().astype(np.longdouble) for tensor in (old, new))
        exact = torch.from_numpy((wide_old + used * (wide_new - wide_old)).astype(np.float64))
        assert_close_in_ulps(average, exact, allowed, old, new)


def test_it_treats_what_is_not_finite_as_lerp_does() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, 1.0])
    count = LARGE // len(values) ** 2 + 1
    average, source = values.repeat(len(values) * count), values.repeat_interleave(len(values)).repeat(count)
    expected = torch.lerp(average, source, 0.25)
    assert is_fused(average, source)
    quickest(average, source, average.dtype)([average], [source], 0.25)
    torch.testing.assert_close(average, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_handed_to_it(dtype: torch.dtype) -> None:
    average, source = (torch.randn(LARGE).to(dtype) for _ in range(2))
    old = average.clone()
    TorchUpdate([average], [source], (), (), None).lerp_(0.25)
    exact = old.double() + 0.25 * (source.double() - old.double())
    assert_close_in_ulps(average, exact, lerp_ulps(dtype), old, source)


@pytest.mark.parametrize("averages_last", [True, False])
@pytest.mark.parametrize("source_last", [True, False])
@pytest.mark.parametrize("gap", [1, 2])
def test_elements_pair_by_index_whatever_their_order_in_memory(
    averages_last: bool, source_last: bool, gap: int
) -> None:
    def tensor(last: bool) -> Tensor:
        whole = torch.randn(SHAPE[0], SHAPE[1] * gap, *SHAPE[2:])
        return whole.to(memory_format=torch.channels_last if last else torch.contiguous_format)[:, ::gap]

    average, source = tensor(averages_last), tensor(source_last)
    old = average.clone()
    TorchUpdate([average], [source], (), (), None).lerp_(0.25)
    exact = old.double() + 0.25 * (source.double() - old.double())
    assert_close_in_ulps(average, exact, lerp_ulps(torch.float32), old, source)


def test_small_tensors_and_other_layouts_are_left_to_lerp() -> None:
    wide = torch.zeros(SHAPE)
    assert is_fused(wide, wide.clone())
    assert not is_fused(wide, wide.to(memory_format=torch.channels_last))
    assert not is_fused(wide[..., :2], torch.zeros_like(wide[..., :2]))
    if torch.get_num_threads() > 1:
        assert not is_fused(torch.zeros(100), torch.zeros(100))


def test_an_update_between_forward_and_backward_disturbs_no_graph_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(256, LARGE // 256 + 1), nn.Linear(LARGE // 256 + 1, 3))
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    loss = model(torch.ones(1, 256)).square().sum()
    average.update_parameters(model)
    average.update_parameters(model)
    # The second layer's weight was saved, and a write to it would be an error here.
    loss.backward()
    assert model[0].weight.grad is not None
