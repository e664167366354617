"""Times one update of the average for every way to make it, on the tensors of real models.

A case runs in a process of its own, because the time of an update that allocates (torch's default on a CPU) depends on
what the allocator has seen before (benchmarks/one_case.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks import overlap, record
from benchmarks.cases import CASES
from benchmarks.one_case import check_case, measure_case
from benchmarks.process import in_fresh_process
from benchmarks.providers import PLANS
from benchmarks.record import Row
from benchmarks.table import table
from benchmarks.verify import YES

GPU_ONLY = "llama8b"
AVERAGED = ("resnet50", "gpt2")
"""The cases of several averages, and on a GPU of stochastic rounding."""
ROUNDED = "resnet20"
"""The case of stochastic rounding on a CPU, where torch's integer operations take a hundred times as long as a lerp."""
SECONDS = {"cpu": 6.0, "cuda": 5.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", choices=SECONDS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help=f"default: all; {GPU_ONLY} on a GPU only")
    parser.add_argument("--plans", nargs="+", choices=PLANS, help="of dtypes and averages; default: those of each case")
    parser.add_argument("--output", type=Path, help="CSV file; default: benchmarks/results/<device>.csv")
    parser.add_argument("--seconds-per-case", type=float, help="for each case and dtype plan; default: 6, on a GPU 5")
    parser.add_argument(
        "--settled-allocator",
        action="store_true",
        help="on a CPU: let the C library keep large blocks, the state in which updates that allocate are quickest",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each case, write the CSV file.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0; 1 if fastswa gave a wrong result or a case's process died; 2 if the device can't do what was asked.
    """
    device = torch.device(arguments.device)
    cases = arguments.cases or [case for case in CASES if device.type == "cuda" or case != GPU_ONLY]
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 2
    if device.type == "cpu" and GPU_ONLY in cases:
        print(f"{GPU_ONLY} needs a GPU: its averages take 16 GB each", file=sys.stderr)
        return 2
    seconds = arguments.seconds_per_case or SECONDS[device.type]
    command = f"python -m benchmarks update --device {device.type} --seconds-per-case {seconds:g}"
    if arguments.cases:
        command += f" --cases {' '.join(cases)}"
    if arguments.plans:
        command += f" --plans {' '.join(arguments.plans)}"
    if arguments.settled_allocator:
        command += " --settled-allocator"

    rows: list[Row] = []
    died = False
    for case in cases:
        for plan in arguments.plans or plans(device, case):
            try:
                # Not in the process that is timed: the check's float64 temporaries change what a CPU's allocator keeps,
                # and with it the time of every update that allocates. On a GPU a second process costs seconds.
                verdicts = in_fresh_process(check_case, case, plan, device) if device.type == "cpu" else None
                measured = in_fresh_process(
                    measure_case, case, plan, device, seconds, command, verdicts, arguments.settled_allocator
                )
            except BrokenProcessPool as error:
                print(f"{case} {plan}: the process died (memory?): {error}", file=sys.stderr)
                died = True
                continue
            print(table(device, measured), flush=True)
            rows += measured
    path = arguments.output or record.default_path(device)
    record.write(path, rows)
    print(f"{len(rows)} measurements in {path}")
    wrong = [row for row in rows if row.provider.startswith("fastswa ") and row.checked != YES]
    for row in wrong:
        print(f"{row.case} {row.plan}: {row.provider}: {row.checked}", file=sys.stderr)
    hidden = arguments.plans or overlap.CASE not in cases or overlap.run(device, command, arguments.output)
    return int(died or bool(wrong) or not hidden)


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
    chosen = ["fp32", "mixed", *(["bf16"] if cuda else [])]
    # On a CPU the check and the memory of GPT-2's averages take most of a minute: once is enough.
    if case in AVERAGED:
        chosen += ["fp32_k2", "fp32_k4"] if cuda or case == AVERAGED[0] else ["fp32_k4"]
    if case in AVERAGED if cuda else case == ROUNDED:
        chosen.append("bf16_stochastic")
    return chosen
