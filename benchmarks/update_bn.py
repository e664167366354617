"""Times a pass that recomputes BatchNorm statistics against torch's and fvcore's, on networks that are run for real.

Every provider's statistics are compared with a float64 reference first; a wrong one gets no time. The passes take
turns, and the numbers that the host reads from the device for each batch are counted.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.batch_norm.cases import CASES, PRECISIONS, SOURCES
from benchmarks.batch_norm.one_case import Row, measure_case
from benchmarks.batch_norm.table import table
from benchmarks.ending import end, wrong_results
from benchmarks.process import in_fresh_process

SECONDS = {"cpu": 16.0, "cuda": 8.0}
GPU_ONLY = "resnet50_batch256"
"""Unless it is asked for: a pass takes a CPU of two cores a minute."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=SECONDS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help=f"default: all; {GPU_ONLY} on a GPU only")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: fp32; on a GPU both")
    parser.add_argument(
        "--batches-from",
        nargs="+",
        choices=SOURCES,
        help=f"where batches wait; default: the model's device, and on a GPU the host too for one {GPU_ONLY}",
    )
    parser.add_argument("--seconds-per-case", type=float, help="to spend on timing; default: 16, on a GPU 8")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/update_bn-<device>.csv")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each case, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result or a case died.
    """
    device = torch.device(arguments.device)
    seconds = arguments.seconds_per_case or SECONDS[device.type]
    command = f"python -m benchmarks update_bn --device {device.type} --seconds-per-case {seconds:g}"
    for option in ("cases", "precisions", "batches_from"):
        if getattr(arguments, option):
            command += f" --{option.replace('_', '-')} {' '.join(getattr(arguments, option))}"

    rows: list[Row] = []
    died = False
    for case, precision, source in comparisons(arguments):
        try:
            measured = in_fresh_process(measure_case, case, precision, source, device, seconds, command)
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            print(f"{case}, {precision}, batches from the {source}: {error}", file=sys.stderr)
            died = True
            continue
        print(table(device, measured), flush=True)
        rows += measured
    path = arguments.output or record.default_path(device, "update_bn-")
    record.write(path, rows, Row)
    return max(int(died), end(path, rows, wrong_results(rows, "case", "precision")))


def comparisons(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """What is to be measured.

    Args:
        arguments: of the command.

    Returns:
        Case, precision and source of the batches, of each comparison.
    """
    cuda = arguments.device == "cuda"
    cases = arguments.cases or [case for case in CASES if cuda or case != GPU_ONLY]
    precisions = arguments.precisions or (PRECISIONS if cuda else PRECISIONS[:1])
    found = list(product(cases, precisions, arguments.batches_from or SOURCES[:1]))
    if cuda and not arguments.batches_from and GPU_ONLY in cases:
        # The largest batches and the least other work: what fetching the next one meanwhile is worth.
        found.append((GPU_ONLY, precisions[-1], "host"))
    return found
