"""Measurements as rows of a CSV file, one a measurement, each with what is needed to repeat it."""

from __future__ import annotations

import csv
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastswa

RESULTS = Path(__file__).parent / "results"

HEADINGS = {
    "share_of_ceiling": "share_of_ceiling (ceiling time / time, higher is better)",
    "ratio_to_fastswa": "ratio_to_fastswa (how many times slower than fastswa)",
    "wall_ratio_to_fastswa": "wall_ratio_to_fastswa (how many times slower than fastswa)",
}
"""Columns whose heading says more than their name."""


@dataclass(frozen=True)
class Environment:
    """Where and with what something was measured: the first columns of every file.

    Args:
        timestamp: of the case's start, UTC.
        device: "cpu" or the GPU's name.
        cpu: the processor's name.
        threads: that torch uses.
        command: that made the file.
        fastswa, torch, triton, python: versions.
    """

    timestamp: str
    device: str
    cpu: str
    threads: int
    command: str
    fastswa: str
    torch: str
    triton: str
    python: str


@dataclass(frozen=True)
class Row(Environment):
    """One measurement of an update; empty where a device has no such quantity or where nothing was timed.

    Args:
        case: a key of `cases.CASES`.
        plan: a key of `providers.PLANS`.
        provider: a key of the plan's providers.
        tensors: parameters.
        buffers: that are copied.
        elements: of the parameters.
        bytes: that an update of all the plan's averages must move.
        p20_us, p50_us, p80_us: percentiles over all runs; on a GPU of the time on the device.
        gb_per_second: bytes over the median time.
        share_of_ceiling: median over the rounds of the ceiling's time over this time.
        ratio_to_fastswa: median over the rounds of this time over fastswa's, the first of the plan's providers.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        host_us: median time until the call returns, with the GPU idle at its start.
        wall_us: median over the rounds of the mean time of calls in a row, the wait for the GPU included.
        wall_ratio_to_fastswa: this wall time over fastswa's.
        launches: kernels, copies and fills that one call starts on the GPU.
        device_reads: numbers that the host reads from tensors in one call; on a GPU from those there, for which it
            waits.
        peak_extra_bytes: the most memory that one call holds at one time beyond what was allocated before it.
        rounds: in which the providers took turns.
        disturbed: of the rounds, how many were measured while other processes ran.
        checked: "yes", where buffers are treated in another way than copied with that ("yes, parameters only"), or why
            there is no time: "wrong: ..." or "skipped: ...".
    """

    case: str
    plan: str
    provider: str
    tensors: int
    buffers: int
    elements: int
    bytes: int
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    gb_per_second: float | None
    share_of_ceiling: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    host_us: float | None
    wall_us: float | None
    wall_ratio_to_fastswa: float | None
    launches: int | None
    device_reads: int | None
    peak_extra_bytes: int | None
    rounds: int
    disturbed: int
    checked: str


def environment(device: torch.device, command: str) -> dict[str, str | int]:
    """The columns of a row that say where and with what it was measured.

    Args:
        device: that was measured.
        command: that was given.

    Returns:
        Values by column.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "command": command,
        "fastswa": fastswa.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type.

    Args:
        device: any device.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def default_path(device: torch.device, prefix: str = "") -> Path:
    """Where the results of a device are kept.

    Args:
        device: that was measured.
        prefix: of the file's name.

    Returns:
        `results/cpu.csv`, or the GPU's name in lower case with hyphens.
    """
    return RESULTS / (prefix + re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".csv")


def write(path: Path, rows: Iterable[Environment], kind: type[Environment] = Row) -> None:
    """Write rows as CSV, numbers to four significant digits.

    Args:
        path: of the file, which is replaced.
        rows: in the order of the file.
        kind: of the rows; its fields are the columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [column.name for column in fields(kind)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADINGS.get(column, column) for column in columns)
        for row in rows:
            values = [getattr(row, column) for column in columns]
            writer.writerow(f"{value:.4g}" if isinstance(value, float) else value for value in values)
