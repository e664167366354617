"""Times one update of the average for every way to make it, on the tensors of real models.

All cases share one process, in which much was allocated and freed before anything is timed, as in a process that trains
(`one_case.settle_allocator`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import ncu, record
from benchmarks.cases import CASES
from benchmarks.ending import end, wrong_results
from benchmarks.one_case import measure_case
from benchmarks.providers import PLANS
from benchmarks.record import Row
from benchmarks.table import table

GPU_ONLY = "llama8b"
AVERAGED = ("resnet50", "gpt2")
"""The cases of several averages, and on a GPU of stochastic rounding."""
ROUNDED = "resnet20"
"""The case of stochastic rounding on a CPU, where torch's integer operations take a hundred times as long as a lerp."""
DEVIATING = ("preresnet164", "resnet50")
"""The cases of SWAG; on a CPU the first, where a published update of ResNet-50's 20 deviations takes a second."""
ONCE = ("resnet20", "vit_b")
"""The cases whose bfloat16 weights a CPU leaves to the others, for the time that all of it takes."""
SECONDS = {"cpu": 3.0, "cuda": 5.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=SECONDS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help=f"default: all; {GPU_ONLY} on a GPU only")
    parser.add_argument("--plans", nargs="+", choices=PLANS, help="of dtypes and averages; default: those of each case")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/<device>.csv")
    parser.add_argument("--seconds-per-case", type=float, help="for each case and dtype plan; default: 3, on a GPU 5")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each case, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result; 2 if the device can't do what was asked.
    """
    device = torch.device(arguments.device)
    cases = arguments.cases or [case for case in CASES if device.type == "cuda" or case != GPU_ONLY]
    if device.type == "cpu" and GPU_ONLY in cases:
        print(f"{GPU_ONLY} needs a GPU: its averages take 16 GB each", file=sys.stderr)
        return 2
    seconds = arguments.seconds_per_case or SECONDS[device.type]
    command = f"python -m benchmarks update --device {device.type} --seconds-per-case {seconds:g}"
    if arguments.cases:
        command += f" --cases {' '.join(cases)}"
    if arguments.plans:
        command += f" --plans {' '.join(arguments.plans)}"

    path = arguments.output or record.default_path(device)
    rows: list[Row] = []
    for case in cases:
        for plan in arguments.plans or plans(device, case):
            measured = measure_case(case, plan, device, seconds, command)
            print(table(device, measured), flush=True)
            rows += measured
            # Each time, so that a process that dies of too little memory has left what it measured.
            record.write(path, rows)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not arguments.plans and not arguments.cases:
        ncu.run(device, command, arguments.output)
    return end(path, rows, wrong_results(rows, "case", "plan"))


def plans(device: torch.device, case: str) -> Sequence[str]:
    """The plans of a case.

    Args:
        device: to be measured.
        case: a key of `CASES`.

    Returns:
        Keys of `PLANS`.
    """
    if case == GPU_ONLY:
        return ("bf16",)
    cuda = device.type == "cuda"
    chosen = ["fp32", *(["mixed"] if cuda or case not in ONCE else []), *(["bf16"] if cuda else [])]
    if case in AVERAGED:
        chosen += ["fp32_k2", "fp32_k4"] if cuda or case == AVERAGED[0] else ["fp32_k4"]
    if case in AVERAGED if cuda else case == ROUNDED:
        chosen.append("bf16_stochastic")
    if case in (DEVIATING if cuda else DEVIATING[:1]):
        chosen.append("swag")
    return chosen
