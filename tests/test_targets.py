"""Targets are judged by the rows of the benchmarks, and say what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.judging import Target, judge
from benchmarks.providers import CACHED, OURS, TORCH
from benchmarks.targets import TARGETS, judged
from benchmarks.weight_averages import PASSES, TIMM


def row(provider: str, case: str = "resnet50", plan: str = "fp32", **values: Any) -> dict[str, Any]:
    return {"provider": provider, "case": case, "plan": plan, **values}


def lines(device: str, *rows: dict[str, Any], command: str = "update") -> list[str]:
    return [verdict.line() for verdict in judged(device, command, rows)]


def test_a_bound_that_the_bytes_forbid_says_so() -> None:
    # torch takes 1 / 0.256 = 3.9 times as long as the ceiling: fastswa at the ceiling would be 3.9 times as fast.
    slow = row(TORCH, ratio_to_fastswa="3.5", share_of_ceiling="0.2564", ratio_p20="3.41", ratio_p80="3.62")
    words = "NOT MET: 3.50 (3.41 to 3.62) times as fast as torch AveragedModel, asked >= 10"
    assert lines("cpu", slow) == [f"{words}; at the byte ceiling it would be 3.90"]
    # Here the bytes would allow it.
    (line,) = lines("cpu", {**slow, "share_of_ceiling": "0.05"})
    assert line.endswith("asked >= 10")
    (line,) = lines("cpu", {**slow, "ratio_to_fastswa": "10", "share_of_ceiling": "0.05"})
    assert line.startswith("met: 10.0 ")


def test_times_the_ceiling_are_the_inverse_of_its_share() -> None:
    assert (
        lines("cpu", row(OURS, share_of_ceiling=0.8))[0] == "NOT MET: 1.25 times the byte ceiling's time, asked <= 1.15"
    )
    assert lines("cpu", row(OURS, share_of_ceiling="0.88"))[0].startswith("met: 1.14 ")
    assert lines("cuda", row(OURS, share_of_ceiling="0.88"))[0] == "NOT MET: 0.880 of the copy's speed, asked >= 0.9"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "word"),
    [
        ("1.02", "1.01", "1.03", "met"),
        # As fast, within the scatter of its rounds.
        ("0.99", "0.97", "1.01", "met"),
        ("0.97", "0.95", "0.99", "NOT MET"),
        # Files of earlier releases have no interval.
        ("0.99", "", "", "NOT MET"),
        ("", "", "", "not measured"),
    ],
)
def test_not_slower_is_judged_by_the_interval(ratio: str, low: str, high: str, word: str) -> None:
    (line,) = lines("cpu", row(CACHED, ratio_to_fastswa=ratio, ratio_p20=low, ratio_p80=high))
    assert line.startswith(f"{word}: ")


def test_an_interval_excuses_no_other_bound() -> None:
    slow = row(PASSES, plan="fp32_k4", ratio_to_fastswa="1.19", ratio_p20="1.1", ratio_p80="1.3")
    assert lines("cpu", slow)[0].startswith("NOT MET: 1.19 (1.10 to 1.30) times as fast as a pass for each average")


def test_the_worst_row_is_judged_and_named() -> None:
    rows = [row(CACHED, case, ratio_to_fastswa=value) for case, value in (("resnet20", 0.9), ("preresnet164", 0.8))]
    assert lines("cpu", *rows) == ["NOT MET: 0.800 times as fast as cached _foreach_lerp_ on PreResNet-164, asked >= 1"]
    # Both are met; a wide interval does not hide the lower value.
    wide, narrow = (
        row(CACHED, case, ratio_to_fastswa=value, ratio_p20="0.9", ratio_p80=high)
        for case, value, high in (("resnet20", "0.95", "1.4"), ("preresnet164", "1.1", "1.2"))
    )
    assert lines("cpu", narrow, wide)[0].startswith("met: 0.950 (0.900 to 1.40) times as fast")
    reads = [
        row(OURS, case, "bf16", device_reads=value) for case, value in (("resnet20", 0), ("vit_b", 2), ("gpt2", 1))
    ]
    assert lines("cpu", *reads) == ["NOT MET: 2.00 device reads on ViT-B, asked <= 0"]
    assert lines("cpu", *[{**each, "device_reads": 0} for each in reads])[0].startswith("met: 0 device reads")


@pytest.mark.parametrize(
    ("device", "plan", "provider", "bound"),
    [
        ("cpu", "fp32_k4", PASSES, 1.2),
        ("cuda", "fp32_k4", PASSES, 1.25),
        ("cuda", "bf16_stochastic", TIMM, 5.0),
    ],
)
def test_several_averages_and_rounding(device: str, plan: str, provider: str, bound: float) -> None:
    for case in ("resnet50", "gpt2"):
        for ratio, word in ((bound, "met"), (0.99 * bound, "NOT MET"), (None, "not measured")):
            assert lines(device, row(provider, case, plan, ratio_to_fastswa=ratio))[0].startswith(f"{word}: ")
    assert not lines("cpu", row(TIMM, "gpt2", "bf16_stochastic", ratio_to_fastswa=1.0))


def test_batch_norm() -> None:
    def rows(case: str, reads: float, **torch: float) -> list[dict[str, Any]]:
        ours = {"case": case, "provider": "fastswa update_bn", "device_reads_per_batch": reads}
        return [ours, {"case": case, "provider": "torch update_bn", **torch}]

    assert lines("cuda", *rows("preresnet164", 0.5, ratio_to_fastswa=1.4), command="update_bn") == [
        "NOT MET: 0.500 device reads per batch, asked <= 0",
        "NOT MET: 1.40 times as fast as torch update_bn, asked >= 1.5",
    ]
    assert lines("cuda", *rows("resnet50_batch256", 0.0, ratio_to_fastswa=1.4), command="update_bn") == [
        "met: 0 device reads per batch, asked <= 0",
        "met: 1.40 times as fast as torch update_bn, asked >= 1.1",
    ]
    assert lines("cpu", *rows("mlp", 0.0, ratio_to_fastswa=1.0), command="update_bn")[1].startswith("met: 1.00 ")


def test_cold_import() -> None:
    # torch takes 0.8 of fastswa's time, so fastswa 1.25 of torch's; the interval turns round with it.
    torch = {"quantity": "import", "case": "", "provider": "torch", "ratio_to_fastswa": "0.8"}
    torch |= {"ratio_p20": "0.78", "ratio_p80": "0.85"}
    words = "times the time of `import torch`, asked <= 1.2"
    assert lines("cpu", torch, command="cold") == [f"NOT MET: 1.25 (1.18 to 1.28) {words}"]


def test_without_rows_nothing_is_claimed() -> None:
    for target in TARGETS:
        assert judge(target, []).line() == f"not measured: {target.quantity} {target.bound}"


def test_a_target_has_one_bound() -> None:
    for target in TARGETS:
        assert (target.at_least is None) != (target.at_most is None)
    target = Target("cpu", "work", "update", {}, "p50_us", "us", at_most=30)
    assert judge(target, [{"p50_us": "30"}]).word == "met"
    assert judge(replace(target, at_most=29), [{"p50_us": "30"}]).word == "NOT MET"
