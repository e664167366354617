"""Times `import fastswa` beside `import torch`, in fresh processes that take turns."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import numpy as np

ALLOWED = 1.2
"""Times torch's own import."""
ROUNDS = 15
MODULES = ("torch", "fastswa")
PROGRAM = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print.

    Args:
        arguments: as `add_arguments` declares them.

    Returns:
        0.
    """
    times = import_seconds(arguments.rounds)
    for module, seconds in times.items():
        low, median, high = np.percentile(seconds, [20, 50, 80])
        print(f"import {module:8} {median:.3f} s ({low:.3f}, {high:.3f})")
    ratio = statistics.median(ours / torch for torch, ours in zip(*times.values(), strict=True))
    verdict = "met" if ratio <= ALLOWED else "NOT MET"
    print(f"{verdict}: importing fastswa takes {ratio:.3f} times as long as torch, asked <= {ALLOWED}")
    return 0


def import_seconds(rounds: int) -> dict[str, list[float]]:
    """The time of each import, torch's before fastswa's.

    Args:
        rounds: pairs that are counted; one before them fills the disk's cache.
    """
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for number in range(rounds + 1):
        for module in MODULES:
            program = [sys.executable, "-c", PROGRAM.format(module=module)]
            printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
            if number:
                times[module].append(float(printed))
    return times
