"""The figures that a recomputation has to reach."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.batch_norm.cases import CASES, PRECISIONS
from benchmarks.batch_norm.one_case import Row
from benchmarks.batch_norm.providers import OURS, TORCH
from benchmarks.targets import Target

Rows = Mapping[str, Row]
"""The measurements of one case, precision and source of batches, by provider."""


def _of_torch(rows: Rows) -> float | None:
    ours, torch = rows[OURS].p50_ms, rows[TORCH].p50_ms
    return ours / torch if ours and torch else None


def _over_torch(rows: Rows) -> float | None:
    return rows[TORCH].ratio_to_fastswa


def _reads(rows: Rows) -> float | None:
    return rows[OURS].device_reads_per_batch


ALL = tuple(CASES)
READS = "device reads per batch"
OF_TORCH = "of torch update_bn's median time"
TIMES_TORCH = "times as fast as torch update_bn"

TARGETS = tuple(
    target
    for precision in PRECISIONS
    for target in (
        Target("cpu", ALL, precision, OF_TORCH, _of_torch, at_most=1.03),
        Target("cpu", ALL, precision, READS, _reads, at_most=0),
        Target("cuda", ("preresnet164",), precision, TIMES_TORCH, _over_torch, at_least=1.5),
        Target("cuda", ("resnet50_batch256",), precision, TIMES_TORCH, _over_torch, at_least=1.1),
        Target("cuda", ALL, precision, READS, _reads, at_most=0),
    )
)
"""By precision where the benchmark of the update has its dtype plan."""
