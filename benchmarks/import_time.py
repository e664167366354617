"""Times `import fastswa` beside `import torch`, in fresh processes that take turns.

The processor's time is given too: it is steadier on a machine that does other things.
"""

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
PROGRAM = """
from time import perf_counter, process_time
start = perf_counter(), process_time()
import {module}
print(perf_counter() - start[0], process_time() - start[1])
"""
KINDS = ("seconds", "of the processor")


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
    ratios = []
    for kind, of_modules in zip(KINDS, times, strict=True):
        for module, seconds in of_modules.items():
            low, median, high = np.percentile(seconds, [20, 50, 80])
            print(f"import {module:8} {median:.3f} ({low:.3f}, {high:.3f}) {kind}")
        ratios.append(statistics.median(ours / torch for torch, ours in zip(*of_modules.values(), strict=True)))
    verdict = "met" if ratios[0] <= ALLOWED else "NOT MET"
    print(
        f"{verdict}: importing fastswa takes {ratios[0]:.3f} times as long as torch, asked <= {ALLOWED}; "
        f"{ratios[1]:.3f} times the processor's time"
    )
    return 0


def import_seconds(rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The time of each import, torch's before fastswa's.

    Args:
        rounds: pairs that are counted; one before them fills the disk's cache.

    Returns:
        By module: time that passed, and time of the processor.
    """
    times: tuple[dict[str, list[float]], ...] = tuple({module: [] for module in MODULES} for _ in KINDS)
    for number in range(rounds + 1):
        for module in MODULES:
            program = [sys.executable, "-c", PROGRAM.format(module=module)]
            printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
            if number:
                for of_modules, seconds in zip(times, printed.split(), strict=True):
                    of_modules[module].append(float(seconds))
    return times[0], times[1]
