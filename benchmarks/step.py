"""Times what averaging adds to the steps of a training.

On a CPU that is the time of the update's call in the loop, right after the optimizer's step, which has filled the
caches with other things. On a GPU the host's time says little, and an update may run beside the next step: there it is
the difference between steps with averaging and without, in the same round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import record
from benchmarks.clocks import PassClock, ReportedClock
from benchmarks.ending import end, wrong_results
from benchmarks.measure import ROUNDS, Times, measure, ratio, ratio_percentiles
from benchmarks.one_case import settle_allocator
from benchmarks.providers import OURS
from benchmarks.table import short
from benchmarks.training_step import OFFLOAD, OVERLAP, WAYS, WORKS, Training, Way, Work, trainings

SECONDS = 20.0
STEPS = 20
"""In a row on a GPU: the last update has no next step to hide under, so at most 19/20 can be hidden."""
ALONE = "no averaging"


@dataclass(frozen=True)
class Row(record.Environment):
    """One way to average during training; empty where nothing was timed.

    Args:
        case: the network, a key of `training_step.WORKS`.
        provider: a key of `training_step.WAYS`.
        step_p50_us: median of a step without averaging.
        p20_us, p50_us, p80_us: of what averaging adds to a step: on a CPU over all steps, on a GPU over the rounds.
        share_of_step: median over the rounds of what averaging adds, over the step with that.
        ratio_to_fastswa: median over the rounds of what averaging adds, over what `fastswa.AveragedModel` adds; empty
            where a round has it add nothing that could be told from noise.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        rounds: in which the trainings took turns.
        disturbed: of the rounds, how many were measured while other processes ran.
        checked: "yes", or why there is no time: "wrong: ..." or "skipped: ...".
    """

    case: str
    provider: str
    step_p50_us: float
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    share_of_step: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    rounds: int
    disturbed: int
    checked: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=WORKS, default="cpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing on a CPU (%(default)g)")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/step-<device>.csv")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each network, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result.
    """
    device = torch.device(arguments.device)
    command = f"python -m benchmarks step --device {device.type}"
    if device.type == "cpu":
        command += f" --seconds {arguments.seconds:g}"
        print("GPU steps, overlap, averages kept on the CPU: not measured: need a GPU")
    ways = {name: way for name, way in WAYS.items() if device.type == "cuda" or name not in (OVERLAP, OFFLOAD)}
    path = arguments.output or record.default_path(device, "step-")
    rows: list[Row] = []
    for case, work in WORKS[device.type].items():
        measured = measure_case(case, work, ways, device, arguments.seconds, command)
        print(table(measured), flush=True)
        rows += measured
        record.write(path, rows, Row)
    return end(path, rows, wrong_results(rows, "case"))


def measure_case(
    case: str,
    work: Work,
    ways: Mapping[str, Way],
    device: torch.device,
    seconds: float,
    command: str,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Time the steps of every way that averages right, in turns.

    Args:
        case: the network's name.
        work: what is trained.
        ways: to average, by name.
        device: where the training runs.
        seconds: to spend on timing, on a CPU.
        command: to be recorded.
        rounds: how many turns each way gets.

    Returns:
        A row for each way, with no times for those that were skipped or wrong.
    """
    facts = record.environment(device, command)
    ready, verdicts = trainings(work, device, ways)
    ready = {ALONE: Training(work, device), **ready}
    if device.type == "cpu":
        settle_allocator()
        calls = {name: training.timed_step for name, training in ready.items()}
        added, disturbed = measure(calls, ReportedClock(), seconds, rounds)
        alone = added.pop(ALONE)
    else:
        passes = {name: partial(training.steps, STEPS) for name, training in ready.items()}
        times, disturbed = measure(passes, PassClock(device), seconds, rounds, runs=1)
        each = {name: own.scaled(1 / STEPS) for name, own in times.items()}
        alone = each.pop(ALONE)
        added = {name: _less(own, alone) for name, own in each.items()}
    rows = []
    for name in ways:
        values = dict.fromkeys(column.name for column in fields(Row))
        values |= facts | {
            "case": case,
            "provider": name,
            "step_p50_us": alone.percentile(50),
            "rounds": len(alone.runs),
            "disturbed": disturbed,
            "checked": verdicts[name],
        }
        rows.append(Row(**values | _figures(name, added, alone)))
    return rows


def _less(own: Times, alone: Times) -> Times:
    """What steps take longer than the others of their round."""
    return Times(
        [[one - other for one, other in zip(*pair, strict=True)] for pair in zip(own.runs, alone.runs, strict=True)]
    )


def _figures(name: str, added: Mapping[str, Times], alone: Times) -> dict[str, float]:
    if name not in added:
        return {}
    own = added[name]
    values = {f"p{percent}_us": own.percentile(percent) for percent in (20, 50, 80)}
    rounds = [
        (statistics.median(more), statistics.median(step)) for more, step in zip(own.runs, alone.runs, strict=True)
    ]
    values["share_of_step"] = float(np.median([more / (more + step) for more, step in rounds]))
    ours = added.get(OURS)
    if ours is not None and all(statistics.median(block) > 0 for block in ours.runs):
        values["ratio_to_fastswa"] = ratio(own, ours)
        values["ratio_p20"], values["ratio_p80"] = ratio_percentiles(own, ours)
    return values


def table(rows: Sequence[Row]) -> str:
    """A heading, and a line for each way to average.

    Args:
        rows: of one network.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    lines = [
        "",
        f"{first.case}, {first.device}: a step takes {first.step_p50_us:.0f} us, and averaging adds",
        f"{'':46} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9} {'of step':>9} {'x fastswa':>9}",
    ]
    for row in rows:
        line = f"{row.provider:46}"
        if row.p50_us is None or row.share_of_step is None:
            lines.append(f"{line} {row.checked}")
            continue
        columns = [*map(short, (row.p20_us, row.p50_us, row.p80_us))]
        columns += [f"{100 * row.share_of_step:.3g} %", short(row.ratio_to_fastswa)]
        lines.append(line + "".join(f" {value:>9}" for value in columns))
    if first.disturbed:
        lines.append(
            f"other processes disturbed {first.disturbed} of {first.rounds} rounds: repeat it on a quiet machine"
        )
    return "\n".join(lines)
