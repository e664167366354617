"""The measurements of one case, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.batch_norm.one_case import Row
from benchmarks.table import short
from benchmarks.targets import judged


def table(device: torch.device, rows: Sequence[Row]) -> str:
    """A heading, a line for each provider, a line for each target.

    Args:
        device: that was measured.
        rows: of one case, precision and source of batches.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    cuda = device.type == "cuda"
    lines = [
        "",
        f"{first.case}, {first.precision}, batches from the {first.batches_from}, {first.device}: "
        f"{first.layers} BatchNorm layers of {first.channels} channels, {first.batches} batches of {first.batch_size}; "
        "times and counts for each batch",
        f"{'':46} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'x fastswa':>9} {'device reads':>12} {'host reads':>10}"
        + (f" {'launches':>8}" if cuda else ""),
    ]
    for row in rows:
        line = f"{row.provider:46}"
        if row.p50_ms is None:
            lines.append(f"{line} {row.checked}")
            continue
        columns = [(row.p20_ms, 9), (row.p50_ms, 9), (row.p80_ms, 9), (row.ratio_to_fastswa, 9)]
        columns += [(row.device_reads_per_batch, 12), (row.host_reads_per_batch, 10)]
        if cuda:
            columns += [(row.launches_per_batch, 8)]
        lines.append(line + "".join(f" {short(value):>{width}}" for value, width in columns))
    if first.disturbed:
        lines.append(
            f"other processes disturbed {first.disturbed} of {first.rounds} rounds: repeat it on a quiet machine"
        )
    lines += [verdict.line() for verdict in judged(device.type, "update_bn", [asdict(row) for row in rows])]
    return "\n".join(lines)
