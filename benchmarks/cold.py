"""Times what is paid once: imports, construction and first update, and updates that find a tensor in other memory."""

from __future__ import annotations

import argparse
import compileall
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.cases import Shapes
from benchmarks.cold_import import KINDS, MODULES, import_times
from benchmarks.cold_updates import FIRSTS, MOVES, PLAN, first_updates, moved_updates
from benchmarks.ending import end, wrong_results
from benchmarks.measure import Times, ratio, ratio_percentiles
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.table import short
from benchmarks.targets import judged
from benchmarks.verify import right, verify

CASES = {"cpu": ("resnet20", "preresnet164", "resnet50"), "cuda": ("preresnet164", "resnet50")}
ROUNDS = {"cpu": 5, "cuda": 3}
SECONDS = 0.5
PACKAGES = ("fastswa", "fastswa_kernels")
PROCESS = "process"
"""The case of imports."""


@dataclass(frozen=True)
class Row(record.Environment):
    """One cost; empty where nothing was timed.

    Args:
        quantity: "import" or "import, the processor's time"; "construction", "first update" or, on a GPU whose kernels
            are then on disk, "first update, kernels compiled before"; "ordinary update", "one tensor moved" or "all
            tensors moved", that is `parameter.data = parameter.data.clone()` right before the update.
        case: "process" for imports, else a key of `cases.CASES`.
        provider: "fastswa" or "torch" for imports, else a key of `providers.PROVIDERS`.
        p20_us, p50_us, p80_us: percentiles; on a GPU until the device is done.
        ratio_to_fastswa: median over the rounds of this time over fastswa's, `fastswa.AveragedModel`'s for updates.
        ratio_p20, ratio_p80: percentiles over the rounds of the same.
        checked: "yes", "no result" for imports, or why there is no time: "wrong: ..." or "skipped: ...".
    """

    quantity: str
    case: str
    provider: str
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    ratio_to_fastswa: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    checked: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=CASES, default="cpu")
    known = sorted({case for cases in CASES.values() for case in cases})
    parser.add_argument("--cases", nargs="*", choices=known, help="default: all of the device; none: imports alone")
    parser.add_argument("--rounds", type=int, help="of fresh processes; default: 5, on a GPU 3")
    parser.add_argument("--seconds-per-case", type=float, default=SECONDS, help="of each other cost (%(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/cold-<device>.csv")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each quantity, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result.
    """
    device = torch.device(arguments.device)
    cases = CASES[device.type] if arguments.cases is None else arguments.cases
    rounds, seconds = arguments.rounds or ROUNDS[device.type], arguments.seconds_per_case
    command = f"python -m benchmarks cold --device {device.type} --rounds {rounds} --seconds-per-case {seconds:g}"
    if tuple(cases) != CASES[device.type]:
        command += f" --cases {' '.join(cases)}"
    path = arguments.output or record.default_path(device, "cold-")
    rows: list[Row] = []
    for measured in measurements(cases, device, rounds, seconds, command):
        print(table(measured), flush=True)
        rows += measured
        record.write(path, rows, Row)
    for verdict in judged(device.type, "cold", [asdict(row) for row in rows]):
        print(f"{verdict.target.work}: {verdict.line()}")
    return end(path, rows, wrong_results(rows, "quantity", "case"))


def measurements(
    cases: Sequence[str], device: torch.device, rounds: int, seconds: float, command: str
) -> Iterator[list[Row]]:
    """Measure one cost after another.

    Args:
        cases: keys of `cases.CASES`.
        device: where models are.
        rounds: of fresh processes.
        seconds: to spend on each cost that needs none.
        command: to be recorded.

    Yields:
        The rows of a quantity and a case.
    """
    facts = record.environment(device, command)
    # As an installer does, and PYTHONDONTWRITEBYTECODE keeps a checkout from it: torch is compiled.
    for package in PACKAGES:
        compileall.compile_dir(resources.files(package), quiet=2)
    imports = import_times(rounds)
    for kind in KINDS:
        yield _rows(facts, kind, PROCESS, imports[kind], dict.fromkeys(MODULES, "no result"))
    for case in cases:
        torch.manual_seed(0)
        verdicts = verify(Shapes(case, PLAN.source, device), PLAN, PROVIDERS)[1]
        times = first_updates(case, [name for name in PROVIDERS if right(verdicts[name])], device, rounds)
        for quantity in FIRSTS:
            if quantity in times:
                yield _rows(facts, quantity, case, times[quantity], verdicts)
        times, found = moved_updates(case, PROVIDERS, device, seconds)
        for quantity in MOVES:
            yield _rows(facts, quantity, case, times[quantity], found[quantity])


def _rows(
    facts: Mapping[str, str | int], quantity: str, case: str, times: Mapping[str, Times], verdicts: Mapping[str, str]
) -> list[Row]:
    rows = []
    ours = times.get(MODULES[0] if case == PROCESS else OURS)
    for name, verdict in verdicts.items():
        values = dict.fromkeys(column.name for column in fields(Row))
        values |= {**facts, "quantity": quantity, "case": case, "provider": name, "checked": verdict}
        if name in times:
            own = times[name]
            values |= {f"p{percent}_us": own.percentile(percent) for percent in (20, 50, 80)}
            if ours is not None:
                low, high = ratio_percentiles(own, ours)
                values |= {"ratio_to_fastswa": ratio(own, ours), "ratio_p20": low, "ratio_p80": high}
        rows.append(Row(**values))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A heading, and a line for each provider.

    Args:
        rows: of one quantity and case.

    Returns:
        The lines as one text.
    """
    first = rows[0]
    lines = ["", f"{f'{first.case}: {first.quantity}':46} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9} {'x fastswa':>9}"]
    for row in rows:
        columns = (row.p20_us, row.p50_us, row.p80_us, row.ratio_to_fastswa)
        timed = "".join(f" {short(value):>9}" for value in columns) if row.p50_us is not None else f" {row.checked}"
        lines.append(f"{row.provider:46}{timed}")
    return "\n".join(lines)
