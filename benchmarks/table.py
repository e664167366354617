"""The measurements of one case, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.providers import PLANS
from benchmarks.record import Row
from benchmarks.targets import judged


def table(device: torch.device, rows: Sequence[Row]) -> str:
    """A heading, a line for each provider, a line for each target.

    Args:
        device: that was measured.
        rows: of one case and plan.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    cuda = device.type == "cuda"
    plan = PLANS[first.plan]
    kept = "SWAG's moments" if plan.moments else "average" if plan.averages == 1 else f"{plan.averages} averages"
    lines = [
        "",
        f"{first.case}, {first.plan} ({plan.source}, {kept} {plan.average}), {first.device}: "
        f"{first.tensors} parameters of {first.elements} elements, {first.buffers} buffers, {first.bytes / 1e6:.4g} MB",
        f"{'':46} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9} {'GB/s':>7} {'of ceiling':>10} {'x fastswa':>9}"
        f" {'reads':>5} {'extra MB':>9}"
        + (f" {'host us':>9} {'wall us':>9} {'x fastswa':>9} {'launches':>8}" if cuda else ""),
    ]
    for row in rows:
        line = f"{row.provider:46}"
        if row.p50_us is None:
            lines.append(f"{line} {row.checked}")
            continue
        columns = [(row.p20_us, 9), (row.p50_us, 9), (row.p80_us, 9), (row.gb_per_second, 7)]
        columns += [(row.share_of_ceiling, 10), (row.ratio_to_fastswa, 9), (row.device_reads, 5)]
        columns.append((None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6, 9))
        if cuda:
            columns += [(row.host_us, 9), (row.wall_us, 9), (row.wall_ratio_to_fastswa, 9), (row.launches, 8)]
        lines.append(line + "".join(f" {short(value):>{width}}" for value, width in columns))
    if first.disturbed:
        lines.append(
            f"other processes disturbed {first.disturbed} of {first.rounds} rounds: repeat it on a quiet machine"
        )
    lines += [verdict.line() for verdict in judged(device.type, "update", [asdict(row) for row in rows])]
    return "\n".join(lines)


def short(value: float | None) -> str:
    """A number to three digits, or more before the point.

    Args:
        value: None for one that was not measured.
    """
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
