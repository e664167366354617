"""Times of updates that share their process with no other.

This is not the state of a process that trains. For updates that allocate, as torch's default does for each tensor, the
process's history decides the time: how much memory the C library keeps for the next temporary depends on what all
its code has freed before. In turns with other providers torch's default on ResNet-50 was seen to take anything from
18 ms to 56 ms in one evening on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.cases import Shapes
from benchmarks.clocks import CPUClock
from benchmarks.measure import FEWEST, MOST, Times, ratio
from benchmarks.process import in_fresh_process
from benchmarks.providers import OURS, PLANS, PROVIDERS, TORCH
from benchmarks.record import Row
from benchmarks.verify import YES

ALONE = ", alone in its process"
PAIRS = 3
COMPARED = (TORCH, OURS)


def alone(measured: Sequence[Row], seconds: float) -> list[Row]:
    """Time torch's default and fastswa's in processes of their own, in pairs, where both gave the right result.

    Args:
        measured: rows of one case and plan on a CPU.
        seconds: to spend on each process's timing.

    Returns:
        A row for each, named with `ALONE`; none for a case that lacks one of them.
    """
    rows = {row.provider: row for row in measured if row.provider in COMPARED and row.checked == YES}
    if len(rows) < len(COMPARED):
        return []
    times = {name: Times() for name in rows}
    for _ in range(PAIRS):
        for name, row in rows.items():
            times[name].runs.append(in_fresh_process(time_alone, row.case, row.plan, name, seconds))
    return [
        replace(
            row,
            provider=name + ALONE,
            p20_us=times[name].percentile(20),
            p50_us=times[name].percentile(50),
            p80_us=times[name].percentile(80),
            gb_per_second=row.bytes / times[name].percentile(50) / 1e3,
            share_of_ceiling=None,
            ratio_to_fastswa=ratio(times[name], times[OURS]),
        )
        for name, row in rows.items()
    ]


def time_alone(case: str, plan: str, provider: str, seconds: float) -> list[float]:
    """Time one provider's update on a CPU.

    Args:
        case: a key of `CASES`.
        plan: a key of `PLANS`.
        provider: a key of `PROVIDERS`.
        seconds: to spend on it.

    Returns:
        Microseconds of each run, without the first few, which prepare.
    """
    torch.manual_seed(0)
    update = PROVIDERS[provider].setup(Shapes(case, PLANS[plan].source), PLANS[plan]).update
    trial, times = Times(), Times()
    CPUClock().block(update, FEWEST, trial)
    count = int(seconds * 1e6 / trial.percentile(50))
    CPUClock().block(update, min(MOST, max(FEWEST, count)), times)
    return times.runs[0]
