"""Times evaluating with the average: the model gets it, and gets its own weights back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.cases import CASES, Shapes
from benchmarks.clocks import CPUClock, CUDAClock
from benchmarks.counts import peak_extra_bytes
from benchmarks.ending import end, wrong_results
from benchmarks.measure import measure
from benchmarks.one_case import figures, settle_allocator
from benchmarks.providers import CEILING, moving
from benchmarks.swap_providers import LENDERS, SWAPPED, Lending, prepare
from benchmarks.table import short
from benchmarks.update import GPU_ONLY
from benchmarks.verify import CEILING_NOTE

SECONDS = 2.5


@dataclass(frozen=True)
class Row(record.Environment):
    """One way there and back; empty where nothing was timed.

    Args:
        case: a key of `cases.CASES`.
        provider: a key of `swap_providers.LENDERS`, or the ceiling.
        elements: of the parameters.
        bytes: that the way must move at least: going, the average and the own weights are read, the latter kept and
            overwritten; coming back, what was kept is read and written. Of parameters alone.
        p20_us, p50_us, p80_us: percentiles over all runs; on a GPU of the time on the device.
        gb_per_second: bytes over the median time.
        share_of_ceiling: median over the rounds of the ceiling's time over this time.
        ratio_to_fastswa: median over the rounds of this time over that of `WeightAverages.swapped`.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        peak_extra_bytes: the most memory that is held at one time beyond what was allocated before.
        rounds: in which the providers took turns.
        disturbed: of the rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time: "wrong: ..." or "skipped: ...".
    """

    case: str
    provider: str
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
    peak_extra_bytes: int | None
    rounds: int
    disturbed: int
    checked: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    cases = [case for case in CASES if case != GPU_ONLY]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="default: all")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/swap-<device>.csv")
    parser.add_argument("--seconds-per-case", type=float, default=SECONDS, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each case, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa did not give the average or the weights back.
    """
    device = torch.device(arguments.device)
    seconds = arguments.seconds_per_case
    command = f"python -m benchmarks swap --device {device.type} --seconds-per-case {seconds:g}"
    if len(arguments.cases) < len(CASES) - 1:
        command += f" --cases {' '.join(arguments.cases)}"
    path = arguments.output or record.default_path(device, "swap-")
    rows: list[Row] = []
    for case in arguments.cases:
        measured = measure_case(case, device, seconds, command)
        print(table(measured), flush=True)
        rows += measured
        record.write(path, rows, Row)
    return end(path, rows, wrong_results(rows, "case"))


def measure_case(case: str, device: torch.device, seconds: float, command: str) -> list[Row]:
    """Time every provider that gives the right weights, there and back.

    Args:
        case: a key of `cases.CASES`.
        device: where the model is.
        seconds: to spend on timing.
        command: to be recorded.

    Returns:
        A row for each provider, with no times for those that were skipped or wrong.
    """
    torch.manual_seed(0)
    facts = record.environment(device, command)
    model = Shapes(case, device=device)
    size = 6 * sum(tensor.nbytes for tensor in model.parameters())
    lendings, verdicts = prepare(model)
    ceiling = moving(size, device)
    if device.type == "cpu":
        settle_allocator()
    calls = {name: (lambda lending=lending: _there_and_back(lending)) for name, lending in lendings.items()}
    clock = CUDAClock() if device.type == "cuda" else CPUClock()
    times, disturbed = measure({**calls, CEILING: ceiling.update}, clock, seconds)
    times[CEILING] = times[CEILING].scaled(1 / ceiling.part)
    rows = []
    for name in (*LENDERS, CEILING):
        values = dict.fromkeys(column.name for column in fields(Row))
        values |= facts | {
            "case": case,
            "provider": name,
            "elements": sum(tensor.numel() for tensor in model.parameters()),
            "bytes": size,
            "peak_extra_bytes": peak_extra_bytes(calls[name], device) if name in calls else None,
            "rounds": len(times[CEILING].runs),
            "disturbed": disturbed,
            "checked": verdicts.get(name, CEILING_NOTE),
        }
        found = figures(times, name, SWAPPED, size)
        rows.append(Row(**values | {column: value for column, value in found.items() if column in values}))
    return rows


def _there_and_back(lending: Lending) -> None:
    with lending.lent():
        pass


def table(rows: Sequence[Row]) -> str:
    """A heading, and a line for each provider.

    Args:
        rows: of one case.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    lines = [
        "",
        f"{first.case}, {first.device}: {first.elements} elements, {first.bytes / 1e6:.4g} MB there and back",
        f"{'':46} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9} {'GB/s':>7} {'of ceiling':>10} {'x fastswa':>9}"
        f" {'extra MB':>9}",
    ]
    for row in rows:
        line = f"{row.provider:46}"
        if row.p50_us is None:
            lines.append(f"{line} {row.checked}")
            continue
        extra = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6
        columns = [(row.p20_us, 9), (row.p50_us, 9), (row.p80_us, 9), (row.gb_per_second, 7)]
        columns += [(row.share_of_ceiling, 10), (row.ratio_to_fastswa, 9), (extra, 9)]
        lines.append(line + "".join(f" {short(value):>{width}}" for value, width in columns))
    if first.disturbed:
        lines.append(
            f"other processes disturbed {first.disturbed} of {first.rounds} rounds: repeat it on a quiet machine"
        )
    return "\n".join(lines)
