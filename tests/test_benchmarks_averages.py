"""The benchmark of several averages, of stochastic rounding, and of SWAG."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastswa
from benchmarks import providers, swag_rule, update
from benchmarks.cases import Shapes
from benchmarks.one_case import measure_case
from benchmarks.providers import CEILING, PLANS, Plan, Prepared
from benchmarks.registry import providers_of
from benchmarks.swag_rule import OUR_SWAG, PUBLISHED, SWAGS
from benchmarks.verify import CEILING_NOTE, YES, right, verify
from benchmarks.weight_averages import (
    LISTS,
    NEAREST,
    ONE_PASS,
    ROUNDED,
    SEVERAL,
    STOCHASTIC,
    TIMM,
)

CPU = torch.device("cpu")
RIGHT = SEVERAL[ONE_PASS]
PLANS_HERE = ("fp32_k2", "fp32_k4", "bf16_stochastic", "swag")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads on a busy machine wait for one another in every call, and the times do not matter here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_right_providers_are_timed(plan: str) -> None:
    rows = {row.provider: row for row in measure_case("resnet20", plan, CPU, 0.01, "")}
    assert list(rows) == list(providers_of(plan))
    for name, row in rows.items():
        assert row.checked.split(",")[0] == (CEILING_NOTE if name == CEILING else YES)
        assert row.p50_us is not None
        assert row.bytes == providers.update_bytes(Shapes("resnet20", PLANS[plan].source), PLANS[plan])
    assert rows[next(iter(rows))].ratio_to_fastswa == 1.0


def test_bytes_of_several_averages() -> None:
    model = nn.BatchNorm1d(8)
    # 16 parameters of 8 K + 4 bytes; 16 floats and one counter, read and written once for all averages.
    for plan, each in (("fp32_k2", 20), ("fp32_k4", 36)):
        assert providers.update_bytes(model, PLANS[plan]) == 16 * each + 16 * 8 + 16


def test_a_large_ceiling_is_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "ADD_LIMIT", 1200)
    model = nn.Linear(100, 1, bias=False)
    assert providers.ceiling(model, PLANS["fp32"]).part == 1.0
    assert providers.ceiling(model, PLANS["fp32_k4"]).part == 1 / 3


def swapped(model: nn.Module, plan: Plan) -> Prepared:
    """Right averages under each other's names."""
    right = RIGHT.setup(model, plan)
    assert right.averages is not None
    kept = right.averages
    return Prepared(right.update, lambda: list(kept())[::-1])


def too_heavy(model: nn.Module, plan: Plan) -> Prepared:
    averages = fastswa.WeightAverages(model, fastswa.EMA(0.5), dtype=plan.average, rounding="stochastic")
    return Prepared(averages.update, lambda: [averages.weights()])


def cuts_off(model: nn.Module, plan: Plan) -> Prepared:
    """A bfloat16 average whose lower digits are dropped, which is one of the neighbours too."""
    average = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    @torch.no_grad()
    def update() -> None:
        for name, parameter in model.named_parameters():
            exact = average[name].float().lerp_(parameter.float(), 0.1)
            average[name].copy_((exact.view(torch.int32) & -(1 << 16)).view(torch.float32))
        for name, buffer in model.named_buffers():
            average[name].copy_(buffer)

    return Prepared(update, lambda: [average])


def one_ulp_off(model: nn.Module, plan: Plan) -> Prepared:
    """Stochastic rounding, and one element beyond its neighbours."""
    right = ROUNDED[STOCHASTIC].setup(model, plan)

    def averages() -> Iterator[dict[str, torch.Tensor]]:
        for average in right.averages():
            last = average["head.bias"][-1:]
            last.view(torch.int16).add_(2)
            yield average

    return Prepared(right.update, averages)


@pytest.mark.parametrize(
    ("plan", "name", "setup", "reason"),
    [
        ("fp32_k2", ONE_PASS, swapped, "wrong: stem.weight is off by"),
        ("bf16_stochastic", STOCHASTIC, too_heavy, "wrong: stem.weight is off by"),
        ("bf16_stochastic", STOCHASTIC, ROUNDED[NEAREST].setup, "wrong: 0 of the results are not the nearest"),
        ("bf16_stochastic", STOCHASTIC, cuts_off, "wrong: 0.49 of the results are not the nearest"),
        ("bf16_stochastic", TIMM, one_ulp_off, "wrong: head.bias is not rounded to a neighbour"),
        ("bf16_stochastic", NEAREST, too_heavy, "wrong: stem.weight is off by"),
    ],
)
def test_a_wrong_result_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, plan: str, name: str, setup: Callable[[nn.Module, Plan], Prepared], reason: str
) -> None:
    own = providers_of(plan)
    monkeypatch.setitem(own, name, replace(own[name], setup=setup))
    rows = {row.provider: row for row in measure_case("resnet20", plan, CPU, 0.01, "")}
    assert rows[name].checked.startswith(reason)
    for row in rows.values():
        assert (row.p50_us is None) == (row.provider == name)


def deviates_from_the_old_mean(model: nn.Module, plan: Plan) -> Prepared:
    """SWAG's published rule, with the last row of one matrix taken before the mean moved."""
    made = SWAGS[PUBLISHED].setup(model, plan)

    def averages() -> Iterator[dict[str, torch.Tensor]]:
        *first, last = made.averages()
        yield from first
        yield {**last, "head.bias": last["head.bias"] * (24 / 23)}

    return Prepared(made.update, averages)


def keeps_the_oldest(model: nn.Module, plan: Plan) -> Prepared:
    """fastswa's SWAG, its deviations in the order of another model."""
    made = SWAGS[OUR_SWAG].setup(model, plan)

    def averages() -> Iterator[dict[str, torch.Tensor]]:
        mean, deviation, *rows = made.averages()
        yield from (mean, deviation, *rows[1:], rows[0])

    return Prepared(made.update, averages)


@pytest.mark.parametrize(
    ("name", "setup", "reason"),
    [
        (PUBLISHED, deviates_from_the_old_mean, "wrong: head.bias is off by"),
        (OUR_SWAG, keeps_the_oldest, "wrong: stem.weight is off by"),
    ],
)
def test_wrong_moments_get_no_time(name: str, setup: Callable[[nn.Module, Plan], Prepared], reason: str) -> None:
    prepared, verdicts = verify(Shapes("resnet20"), PLANS["swag"], {name: replace(SWAGS[name], setup=setup)})
    assert not prepared
    assert verdicts[name].startswith(reason)
    assert not right(verdicts[name])


def test_the_published_rule_reads_a_counter_for_each_tensor() -> None:
    rows = {row.provider: row for row in measure_case("resnet20", "swag", CPU, 0.01, "")}
    assert (rows[OUR_SWAG].device_reads, rows[PUBLISHED].device_reads) == (0, 7 * 59)
    largest = 4 * 36_864 * (swag_rule.RANK + 1)
    assert rows[PUBLISHED].peak_extra_bytes >= largest > rows[OUR_SWAG].peak_extra_bytes


def test_a_missing_timm_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.utils", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    plan = PLANS["bf16_stochastic"]
    _, verdicts = verify(nn.Linear(2, 2).to(plan.source), plan, {TIMM: ROUNDED[TIMM]})
    assert verdicts[TIMM] == "skipped: timm is not installed"


def test_a_timm_without_stochastic_rounding_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(ModelEmaV3=lambda model, decay: None)
    monkeypatch.setitem(sys.modules, "timm.utils", old)
    plan = PLANS["bf16_stochastic"]
    prepared, verdicts = verify(nn.Linear(2, 2).to(plan.source), plan, {TIMM: ROUNDED[TIMM]})
    assert not prepared
    assert verdicts[TIMM].startswith("skipped: TypeError: ")
    assert "stochastic_rounding" in verdicts[TIMM]


def test_the_plans_hold_what_the_targets_ask() -> None:
    for device in (CPU, torch.device("cuda")):
        for case in ("resnet50", "gpt2"):
            assert "fp32_k4" in update.plans(device, case)
        assert any("bf16_stochastic" in update.plans(device, case) for case in ("resnet20", "gpt2"))


def test_the_lists_share_their_buffers() -> None:
    plan = PLANS["fp32_k2"]
    one, other = SEVERAL[LISTS].setup(nn.BatchNorm1d(2), plan).averages()
    assert one["running_mean"] is other["running_mean"]
    assert one["weight"] is not other["weight"]
