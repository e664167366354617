"""Times imports in fresh processes that take turns: the time that passes, and the processor's, which is steadier."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Times

MODULES = ("fastswa", "torch")
KINDS = ("import", "import, the processor's time")
PROGRAM = """
from time import perf_counter, process_time
start = perf_counter(), process_time()
import {module}
print(perf_counter() - start[0], process_time() - start[1])
"""


def import_times(rounds: int) -> dict[str, dict[str, Times]]:
    """The time of each import.

    Args:
        rounds: turns that are counted; one before them fills the disk's cache.

    Returns:
        By kind, then by module.
    """
    times = {kind: {module: Times() for module in MODULES} for kind in KINDS}
    for number in range(rounds + 1):
        for module in MODULES:
            program = [sys.executable, "-c", PROGRAM.format(module=module)]
            printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
            if number:
                for kind, seconds in zip(KINDS, printed.split(), strict=True):
                    times[kind][module].runs.append([1e6 * float(seconds)])
    return times
