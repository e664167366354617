"""Small CSV files as the benchmarks write them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import HEADINGS

ENVIRONMENT = {
    "timestamp": "2026-11-23T21:22:19+00:00",
    "device": "cpu",
    "cpu": "AMD EPYC",
    "threads": "2",
    "fastswa": "0.1.0",
    "torch": "2.13.0+cpu",
    "triton": "3.7.1",
    "python": "3.11.7",
}


def write(path: Path, command: str, rows: Sequence[dict[str, Any]], **environment: str) -> None:
    """Write rows, all of which have the first one's columns.

    Args:
        path: of the file.
        command: of the benchmark.
        rows: without the columns of `ENVIRONMENT`.
        **environment: other values of these.
    """
    first = {**ENVIRONMENT, "command": f"python -m benchmarks {command}", **environment}
    columns = [*first, *rows[0]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADINGS.get(column, column) for column in columns)
        writer.writerows([{**first, **row}[column] for column in columns] for row in rows)


def update(case: str, provider: str, p50_us: Any, ratio: Any, **values: Any) -> dict[str, Any]:
    """A row of `update`.

    Args:
        case: the network.
        provider: that was timed.
        p50_us: its time.
        ratio: of it to fastswa's; its interval is a tenth wide on either side.
        **values: of other columns.
    """
    row = {"case": case, "plan": "fp32", "provider": provider, "tensors": 59, "buffers": 57, "p20_us": p50_us}
    row |= {"p50_us": p50_us, "p80_us": p50_us, "share_of_ceiling": "0.5", "ratio_to_fastswa": ratio}
    ends = (f"{factor * float(ratio):.4g}" if ratio else "" for factor in (0.9, 1.1))
    return row | dict(zip(("ratio_p20", "ratio_p80"), ends, strict=True)) | {"disturbed": 0, "checked": "yes"} | values
