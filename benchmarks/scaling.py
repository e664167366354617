"""Times updates as a model grows: in elements, in the number of its tensors, and in the number of averages."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from benchmarks import record
from benchmarks.clocks import CPUClock, CUDAClock
from benchmarks.ending import end, wrong_results
from benchmarks.measure import measure
from benchmarks.one_case import figures, settle_allocator
from benchmarks.providers import CEILING, Plan, Provider, update_bytes
from benchmarks.registry import providers_of
from benchmarks.table import short
from benchmarks.verify import right, verify
from benchmarks.weight_averages import SEVERAL

LARGEST = {"cpu": 10**8, "cuda": 10**9}
ELEMENTS = 4_000_000
"""Where the number of tensors or of averages grows."""
TENSORS = 100
"""Where it does not grow."""
SERIES = ("size", "tensors", "averages")
SECONDS = 0.8


@dataclass(frozen=True)
class Point:
    """What is updated once.

    Args:
        x: the number that grows in the series.
        tensors: of equal size.
        elements: of all of them.
        averages: in float32, as are the tensors.
    """

    x: int
    tensors: int
    elements: int
    averages: int = 1


@dataclass(frozen=True)
class Row(record.Environment):
    """One provider at one point of a series; empty where nothing was timed.

    Args:
        series: "size", "tensors" or "averages": what grows.
        x: elements, tensors or averages.
        provider: of one average a key of `registry.providers_of("fp32")`, in "averages" one of `SEVERAL`.
        tensors: parameters of equal size.
        elements: of all parameters.
        averages: float32, of float32 parameters.
        bytes: that an update must move.
        p20_us, p50_us, p80_us: percentiles over all runs; on a GPU of the time on the device.
        gb_per_second: bytes over the median time.
        share_of_ceiling: median over the rounds of the ceiling's time over this time.
        ratio_to_fastswa: median over the rounds of this time over that of the first provider.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        rounds: in which the providers took turns.
        disturbed: of the rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time: "wrong: ..." or "skipped: ...".
    """

    series: str
    x: int
    provider: str
    tensors: int
    elements: int
    averages: int
    bytes: int
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    gb_per_second: float | None
    share_of_ceiling: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    rounds: int
    disturbed: int
    checked: str


class Equal(nn.Module):
    """Float32 parameters of equal size.

    Args:
        tensors: how many.
        elements: of all of them; what does not divide is left out.
        device: where they are made.
    """

    def __init__(self, tensors: int, elements: int, device: torch.device) -> None:
        super().__init__()
        for number in range(tensors):
            values = torch.empty(elements // tensors, device=device).uniform_(-1.0, 1.0)
            self.register_parameter(f"tensor{number}", nn.Parameter(values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=LARGEST, default="cpu")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=SERIES, help="default: all")
    parser.add_argument("--largest", type=int, help="elements of the largest model; default: 10**8, on a GPU 10**9")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the other series (%(default)s)")
    parser.add_argument("--seconds-per-point", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/scaling-<device>.csv")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each series, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result.
    """
    device = torch.device(arguments.device)
    seconds, largest = arguments.seconds_per_point, arguments.largest or LARGEST[device.type]
    command = f"python -m benchmarks scaling --device {device.type} --seconds-per-point {seconds:g}"
    if largest != LARGEST[device.type]:
        command += f" --largest {largest}"
    if arguments.elements != ELEMENTS:
        command += f" --elements {arguments.elements}"
    if len(arguments.series) < len(SERIES):
        command += f" --series {' '.join(arguments.series)}"
    path = arguments.output or record.default_path(device, "scaling-")
    rows: list[Row] = []
    for series in arguments.series:
        measured: list[Row] = []
        providers = SEVERAL if series == "averages" else providers_of("fp32")
        for point in points(series, largest, arguments.elements):
            measured += measure_point(series, point, providers, device, seconds, command)
            # Each time, so that a process that dies of too little memory has left what it measured.
            record.write(path, [*rows, *measured], Row)
        print(table(measured), flush=True)
        rows += measured
    return end(path, rows, wrong_results(rows, "series", "x"))


def points(series: str, largest: int, elements: int) -> list[Point]:
    """The points of a series.

    Args:
        series: of `SERIES`.
        largest: elements of the largest model in "size"; each other has a tenth of the next.
        elements: of the model in the other series.
    """
    if series == "size":
        sizes = [10**power for power in range(4, 10) if 10**power <= largest]
        return [Point(size, TENSORS, size) for size in sizes]
    if series == "tensors":
        return [Point(tensors, tensors, elements) for tensors in (1, 10, 100, 1000, 10_000) if tensors <= elements]
    return [Point(averages, TENSORS, elements, averages) for averages in (1, 2, 4, 8)]


def measure_point(
    series: str, point: Point, providers: Mapping[str, Provider], device: torch.device, seconds: float, command: str
) -> list[Row]:
    """Time every provider that gives the right result.

    Args:
        series: of `SERIES`.
        point: of the series.
        providers: by name; the first is compared with, the ceiling is among them.
        device: where the model is.
        seconds: to spend on timing.
        command: to be recorded.

    Returns:
        A row for each provider, with no times for those that were skipped or wrong.
    """
    torch.manual_seed(0)
    facts = record.environment(device, command)
    plan = Plan(series, torch.float32, torch.float32, averages=point.averages)
    model = Equal(point.tensors, point.elements, device)
    size = update_bytes(model, plan)
    prepared, verdicts = verify(model, plan, providers)
    if device.type == "cpu":
        settle_allocator()
    clock = CUDAClock() if device.type == "cuda" else CPUClock()
    times, disturbed = measure({name: ready.update for name, ready in prepared.items()}, clock, seconds)
    for name, ready in prepared.items():
        times[name] = times[name].scaled(1 / ready.part)
    rows = []
    for name in providers:
        values = dict.fromkeys(column.name for column in fields(Row))
        values |= facts | {
            "series": series,
            "x": point.x,
            "provider": name,
            "tensors": point.tensors,
            "elements": sum(tensor.numel() for tensor in model.parameters()),
            "averages": point.averages,
            "bytes": size,
            "rounds": len(times[CEILING].runs),
            "disturbed": disturbed,
            "checked": verdicts[name],
        }
        found = figures(times, name, next(iter(providers)), size)
        rows.append(Row(**values | {column: value for column, value in found.items() if column in values}))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Median times, and the bandwidth that they mean, of every provider at every point.

    Args:
        rows: of one series.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    found = {(row.provider, row.x): row for row in rows}
    numbers = list(dict.fromkeys(row.x for row in rows))
    lines = []
    for quantity, column in (("median us", "p50_us"), ("GB/s", "gb_per_second"), ("of ceiling", "share_of_ceiling")):
        lines += ["", f"{first.device}, {quantity} by {first.series}"]
        lines.append(f"{'':46}" + "".join(f" {number:>10}" for number in numbers))
        for name in dict.fromkeys(row.provider for row in rows):
            values = (getattr(found[name, number], column) for number in numbers)
            lines.append(f"{name:46}" + "".join(f" {short(value):>10}" for value in values))
    each = [f"{found[first.provider, x].bytes / found[first.provider, x].elements:g}" for x in numbers]
    lines.append(f"{'bytes to move for an element':46}" + "".join(f" {value:>10}" for value in each))
    reasons = dict.fromkeys(f"{row.provider}: {row.checked}" for row in rows if not right(row.checked))
    lines += reasons
    disturbed = sum({row.x: row.disturbed for row in rows}.values())
    if disturbed:
        of = sum({row.x: row.rounds for row in rows}.values())
        lines.append(f"other processes disturbed {disturbed} of {of} rounds: repeat it on a quiet machine")
    return "\n".join(lines)
