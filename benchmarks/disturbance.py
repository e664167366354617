"""How much of the processors' time went to other work while something was measured.

Two threads of one call wait for each other, so a third that takes one's processor for a moment delays the whole call:
a call of 20 microseconds has been seen to take 8 milliseconds. Such a measurement is of the scheduler.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LIMIT = 0.1
"""Share of all processors from which a round counts as disturbed; an idle system's own work takes 0.01 to 0.03."""


class Disturbance:
    """The share of processor time that other processes, and other machines on the same hardware, take from now on."""

    def __init__(self) -> None:
        self._busy, self._own = _busy_seconds(), time.process_time()
        self._start = time.perf_counter()

    def share(self) -> float:
        """Since the start, of all processors; 0 where the system does not tell."""
        busy = _busy_seconds() - self._busy - (time.process_time() - self._own)
        return max(0.0, busy / (os.cpu_count() or 1) / (time.perf_counter() - self._start))


def wait_until_alone(seconds: float) -> float:
    """Sleep until a second has passed without other work, or the time is up.

    Args:
        seconds: the longest wait.

    Returns:
        How long it took.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        others = Disturbance()
        time.sleep(1.0)
        if others.share() <= LIMIT:
            break
    return time.perf_counter() - start


def _busy_seconds() -> float:
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
