"""The figures that an update has to reach, stated as ratios of times of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import CACHED, CEILING, OURS, TORCH
from benchmarks.record import Row
from benchmarks.weight_averages import PASSES, TIMM

Rows = Mapping[str, Row]
"""The measurements of one case and plan, by provider."""


@dataclass(frozen=True)
class Target:
    """A bound on one quantity.

    Args:
        device: "cpu" or "cuda".
        cases: that it binds.
        plan: of the dtypes.
        quantity: in words.
        value: the quantity, from the measurements of a case; None where it was not measured.
        at_least: the bound from below, or
        at_most: the bound from above.
    """

    device: str
    cases: Sequence[str]
    plan: str
    quantity: str
    value: Callable[[Mapping[str, Any]], float | None]
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value keeps the bound.

        Args:
            value: of the quantity.
        """
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


def _over_torch(rows: Rows) -> float | None:
    return rows[TORCH].ratio_to_fastswa


def _wall_over_torch(rows: Rows) -> float | None:
    return rows[TORCH].wall_ratio_to_fastswa


def _over_cached(rows: Rows) -> float | None:
    return rows[CACHED].ratio_to_fastswa


def _over_ceiling(rows: Rows) -> float | None:
    ratio = rows[CEILING].ratio_to_fastswa
    return None if ratio is None else 1 / ratio


def _share(rows: Rows) -> float | None:
    return rows[OURS].share_of_ceiling


def _host(rows: Rows) -> float | None:
    return rows[OURS].host_us


def _device(rows: Rows) -> float | None:
    return rows[OURS].p50_us


def _over_passes(rows: Rows) -> float | None:
    return rows[PASSES].ratio_to_fastswa


def _over_timm(rows: Rows) -> float | None:
    return rows[TIMM].ratio_to_fastswa


ALL = ("resnet20", "preresnet164", "resnet50", "vit_b", "gpt2")
LARGE = ("resnet50", "vit_b", "gpt2")
TIMES_TORCH = "times as fast as torch AveragedModel"
END_TO_END = "times as fast as torch AveragedModel, end to end"
TIMES_CACHED = "times as fast as cached _foreach_lerp_"
TIMES_CEILING = "times the ceiling's time"
TIMES_PASSES = "times as fast as a pass for each average"
TIMES_TIMM = "times as fast as timm ModelEmaV3's stochastic rounding"
SHARE = "of the copy's speed"

TARGETS = (
    Target("cpu", ("resnet50", "gpt2"), "fp32", TIMES_TORCH, _over_torch, at_least=10),
    Target("cpu", ("resnet50", "gpt2"), "fp32", TIMES_CEILING, _over_ceiling, at_most=1.15),
    Target("cpu", ("gpt2",), "mixed", TIMES_TORCH, _over_torch, at_least=10),
    Target("cpu", ("gpt2",), "mixed", TIMES_CEILING, _over_ceiling, at_most=1.6),
    Target("cpu", ("preresnet164",), "fp32", TIMES_TORCH, _over_torch, at_least=15),
    Target("cpu", ("preresnet164",), "fp32", TIMES_CEILING, _over_ceiling, at_most=4.5),
    Target("cpu", ALL, "fp32", TIMES_CACHED, _over_cached, at_least=1),
    Target("cpu", ("resnet50", "gpt2"), "fp32_k4", TIMES_PASSES, _over_passes, at_least=1.2),
    Target("cuda", ("resnet50", "gpt2"), "fp32", SHARE, _share, at_least=0.9),
    Target("cuda", ("gpt2",), "mixed", SHARE, _share, at_least=0.9),
    Target("cuda", ("resnet50",), "fp32", END_TO_END, _wall_over_torch, at_least=20),
    Target("cuda", ("resnet50",), "fp32", "us on the host", _host, at_most=30),
    Target("cuda", ("preresnet164",), "fp32", "us on the GPU", _device, at_most=15),
    Target("cuda", LARGE, "fp32", TIMES_CACHED, _over_cached, at_least=1),
    Target("cuda", ("resnet20", "preresnet164"), "fp32", TIMES_CACHED, _over_cached, at_least=2),
    Target("cuda", ("resnet50", "gpt2"), "fp32_k4", TIMES_PASSES, _over_passes, at_least=1.25),
    Target("cuda", ("resnet50", "gpt2"), "bf16_stochastic", TIMES_TIMM, _over_timm, at_least=5),
)


def judge(
    device: str, case: str, plan: str, rows: Mapping[str, Any], targets: Sequence[Target] = TARGETS
) -> Iterator[str]:
    """The targets of one case, each in a line that says whether it is met.

    Args:
        device: "cpu" or "cuda".
        case: that was measured.
        plan: of its dtypes.
        rows: its measurements, by provider.
        targets: to choose from.

    Yields:
        Lines; none for a case without targets.
    """
    for target in targets:
        if (target.device, target.plan) != (device, plan) or case not in target.cases:
            continue
        value = target.value(rows)
        bound = f">= {target.at_least:g}" if target.at_least is not None else f"<= {target.at_most:g}"
        if value is None:
            yield f"not measured: {target.quantity} {bound}"
        else:
            yield f"{'met' if target.met(value) else 'NOT MET'}: {value:.3g} {target.quantity}, asked {bound}"
