"""Times one update in each library that averages weights: as the library does it, and through fastswa's stand-in.

A library's file here gives `original(model)` and `ours(model)`: the same options, each prepared for the model as the
library's training loop prepares it, as a `Prepared`. Its `update` is the call that the loop makes after a step; its
`averages()` yields one mapping with the averaged tensors under the model's names. At these options every update must
average (no delayed start, no update that is left out).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.cases import CASES
from benchmarks.ending import end
from benchmarks.integrations.check import ORIGINAL, OURS, check_pair
from benchmarks.integrations.pair import PairRow, measure_pair
from benchmarks.measure import ROUNDS
from benchmarks.process import in_fresh_process
from benchmarks.table import short
from benchmarks.verify import YES

LIBRARIES = {
    "lightning": "lightning",
    "timm": "timm",
    "diffusers": "diffusers",
    "torch_ema": "torch-ema",
    "ema_pytorch": "ema-pytorch",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
    "ignite": "pytorch-ignite",
}
"""The files here, and the distributions that they need."""

SHAPES = ("resnet50", "gpt2")
SECONDS = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="default: all")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(SHAPES), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/integrations-<device>.csv")
    parser.add_argument("--seconds-per-case", type=float, default=SECONDS, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if a stand-in gave a wrong result.
    """
    device = torch.device(arguments.device)
    seconds = arguments.seconds_per_case
    command = f"python -m benchmarks integrations --device {device.type} --seconds-per-case {seconds:g}"
    command += "".join(
        f" --{option} {' '.join(chosen)}"
        for option, chosen, default in (
            ("libraries", arguments.libraries, LIBRARIES),
            ("cases", arguments.cases, SHAPES),
        )
        if list(chosen) != list(default)
    )
    rows: list[PairRow] = []
    print(HEADING)
    for library in arguments.libraries:
        try:
            version(LIBRARIES[library])
        except PackageNotFoundError:
            print(f"{library}: skipped, {LIBRARIES[library]} is not installed")
            continue
        for case in arguments.cases:
            # Of its own: a library's imports stay with it, and no peak of memory of one case is the next one's.
            pair = in_fresh_process(_compared, library, case, device, seconds, command)
            print(table(pair), flush=True)
            rows += pair
    path = arguments.output or record.default_path(device, "integrations-")
    record.write(path, rows, PairRow)
    for line in slower(rows):
        print(line)
    own = [row for row in rows if row.implementation == OURS]
    return end(path, rows, [f"{row.library}, {row.case}: {row.checked}" for row in own if row.checked != YES])


def _compared(library: str, case: str, device: torch.device, seconds: float, command: str) -> list[PairRow]:
    verdicts = check_pair(library, case, device)
    return measure_pair(library, version(LIBRARIES[library]), case, device, seconds, command, verdicts)


HEADING = f"{'':24} {'original us (20 %, 80 %)':>34} {'fastswa us (20 %, 80 %)':>34} {'times as fast':>14}"


def table(rows: Sequence[PairRow]) -> str:
    """The lines of one library and case.

    Args:
        rows: the original's and fastswa's.
    """
    rows_of = {row.implementation: row for row in rows}
    original, ours = rows_of[ORIGINAL], rows_of[OURS]
    line = f"{original.library + ', ' + original.case:24}"
    for row in (original, ours):
        times = f"{short(row.p50_us)} ({short(row.p20_us)}, {short(row.p80_us)})"
        line += f" {times if row.p50_us is not None else row.checked:>34}"
    line += f" {short(original.ratio_to_fastswa):>14}"
    if original.wall_us is not None:
        line += f", {short(original.wall_ratio_to_fastswa)} in a row; {original.launches} and {ours.launches} launches"
    if original.disturbed:
        line += f"; other processes disturbed {original.disturbed} of {ROUNDS} rounds"
    return line


def slower(rows: Sequence[PairRow]) -> list[str]:
    """Where fastswa takes longer, in words: of equal times either may be the longer, so the interval must not reach 1.

    Args:
        rows: of any libraries and cases.
    """
    lines = []
    for row in rows:
        for ratio, highest, kind in (
            (row.ratio_to_fastswa, row.ratio_p80, "time"),
            (row.wall_ratio_to_fastswa, row.wall_ratio_to_fastswa, "time in a row"),
        ):
            if row.implementation == ORIGINAL and ratio is not None and (highest or ratio) < 1:
                lines.append(f"slower: {row.library}, {row.case}: fastswa takes {1 / ratio:.3g} times the {kind}")
    return lines or ["none is slower"]
