"""Times of several calls that take turns, so that a noisy or drifting machine is equally unfair to all.

Each round gives every call a block of consecutive runs, in an order shuffled by a fixed seed. Ratios are taken within a
round and then their median over the rounds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarks.disturbance import LIMIT, Disturbance, wait_until_alone

ROUNDS = 9
FEWEST, MOST = 3, 100
"""Counted runs in a block."""
PATIENCE = 4

Call = Callable[[], object]


@dataclass
class Times:
    """Microseconds of one call, in one list a round.

    Args:
        runs: each counted run; on a GPU the time between two events on the device.
        host: each run's time on the host until the call returns; on a GPU only.
        wall: mean time of consecutive runs, the wait for the device included; on a GPU only.
    """

    runs: list[list[float]] = field(default_factory=list)
    host: list[list[float]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def extend(self, more: Times) -> None:
        """Add the rounds of other times.

        Args:
            more: of the same call.
        """
        self.runs += more.runs
        self.host += more.host
        self.wall += more.wall

    def scaled(self, factor: float) -> Times:
        """All times multiplied, for a call that did a part of the work.

        Args:
            factor: how many times the call would have to run.
        """
        runs, host = ([[factor * run for run in block] for block in blocks] for blocks in (self.runs, self.host))
        return Times(runs, host, [factor * mean for mean in self.wall])

    def percentile(self, percent: float) -> float:
        """Over the runs of all rounds."""
        return float(np.percentile([run for block in self.runs for run in block], percent))


def ratio(slow: Times, fast: Times) -> float:
    """How many times longer one call takes than another.

    Args:
        slow: times of the one.
        fast: times of the other, in the same rounds.

    Returns:
        The median over the rounds of the ratio of the blocks' medians.
    """
    pairs = zip(slow.runs, fast.runs, strict=True)
    return statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)


def ratio_percentiles(slow: Times, fast: Times) -> tuple[float, float]:
    """How far `ratio` scatters from round to round.

    Args:
        slow: times of the one.
        fast: times of the other, in the same rounds.

    Returns:
        The 20 and 80 % percentiles over the rounds of the ratio of the blocks' medians.
    """
    pairs = zip(slow.runs, fast.runs, strict=True)
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    return float(np.percentile(ratios, 20)), float(np.percentile(ratios, 80))


class Clock(Protocol):
    """Runs blocks of calls."""

    def block(self, call: Call, count: int, times: Times) -> None:
        """Run a call once uncounted, then `count` times, and add a round to `times`."""


def measure(
    calls: Mapping[str, Call], clock: Clock, seconds: float, rounds: int = ROUNDS, runs: int | None = None
) -> tuple[dict[str, Times], int]:
    """Time calls in turns.

    A round that other processes disturb is repeated when they are done, until `PATIENCE` times `seconds` are lost.

    Args:
        calls: by name.
        clock: of the device on which they run.
        seconds: to spend on all of them; slow calls take longer, since each runs at least `FEWEST` times a round.
        rounds: how many turns each call gets.
        runs: counted ones in each block; left out, as many as fit into the time, which costs a trial of each call.

    Returns:
        Times by name, and how many of the rounds were disturbed all the same.
    """
    counts = dict.fromkeys(calls, runs) if runs else _counts(calls, clock, seconds / rounds / max(1, len(calls)))
    times = {name: Times() for name in calls}
    order = random.Random(0)
    names = list(calls)
    disturbed, patience = 0, PATIENCE * seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        while any(len(own.runs) < rounds for own in times.values()):
            order.shuffle(names)
            start, others = time.perf_counter(), Disturbance()
            turn = {name: Times() for name in names}
            for name in names:
                clock.block(calls[name], counts[name], turn[name])
            gc.collect()
            if others.share() > LIMIT:
                patience -= time.perf_counter() - start
                patience -= wait_until_alone(patience)
                if patience > 0:
                    continue
                disturbed += 1
            for name in names:
                times[name].extend(turn[name])
    finally:
        if collecting:
            gc.enable()
    return times, disturbed


def _counts(calls: Mapping[str, Call], clock: Clock, seconds: float) -> dict[str, int]:
    """How many runs of each call fit into the time of its block."""
    counts = {}
    for name, call in calls.items():
        start = time.perf_counter()
        clock.block(call, FEWEST, Times())
        # What a counted run costs, the clock's own pauses included.
        each = (time.perf_counter() - start) / FEWEST
        counts[name] = min(MOST, max(FEWEST, int(seconds / each)))
    return counts
